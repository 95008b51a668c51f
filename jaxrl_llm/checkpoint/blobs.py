"""Bytes that never change: each is written once, however many checkpoints hold it."""

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from jaxrl_llm.checkpoint.manifest import Place, read_manifest
from jaxrl_llm.checkpoint.run_directory import sync
from jaxrl_llm.parallel import hosts

Blob = UInt8[np.ndarray, " n"]
LEAST_USED = 0.5
"""Share of a file's bytes that are in use, below which they are written again."""


class Blobs:
    """Blobs by name, in files of a directory: one for each save that had something new."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._known: dict[str, tuple[Blob, Place]] = {}
        """What is on disk: the array, by which it is recognized, and its place."""

    def save(self, step: int, blobs: Mapping[str, Blob]) -> dict[str, Place]:
        """Return the place of each blob, all on disk; the first process writes. An array that was saved or restored before is not
        written again.

        Args:
            step: names the file.
            blobs: by name.

        Raises:
            OSError: the storage refuses, on every process.
        """
        places: dict[str, Place] = {}
        refused: OSError | None = None
        try:
            if jax.process_index() == 0:
                places = self._save(step, blobs)
        except OSError as error:
            refused = error
        if not hosts.all_agree(refused is None):
            raise refused or OSError("the first process could not write")
        return places

    def _save(self, step: int, blobs: Mapping[str, Blob]) -> dict[str, Place]:
        old = {n: self._known[n][1] for n, blob in blobs.items() if n in self._known and self._known[n][0] is blob}
        sparse = self._sparse(old.values())
        old = {name: place for name, place in old.items() if place.file not in sparse}
        places = old | self._write(step, {name: blob for name, blob in blobs.items() if name not in old})
        self._known = {name: (blob, places[name]) for name, blob in blobs.items()}
        return places

    def _sparse(self, places: Iterable[Place]) -> set[str]:
        """Files of which little is in use."""
        used: dict[str, int] = {}
        for place in places:
            used[place.file] = used.get(place.file, 0) + place.length
        return {file for file, n in used.items() if n < LEAST_USED * (self.directory / file).stat().st_size}

    def _write(self, step: int, blobs: Mapping[str, Blob]) -> dict[str, Place]:
        if not blobs:
            return {}
        prints = {name: zlib.crc32(blob) for name, blob in blobs.items()}
        file, places, start = f"{step}-{sum(prints.values()) & 0xFFFFFFFF:08x}", {}, 0
        for name, blob in blobs.items():
            places[name] = Place(file, start, blob.nbytes, prints[name])
            start += blob.nbytes
        self.directory.mkdir(exist_ok=True)
        unfinished = self.directory / f"{file}.tmp"
        with unfinished.open("wb") as out:
            for blob in blobs.values():
                out.write(blob)
            out.flush()
            os.fsync(out.fileno())
        unfinished.rename(self.directory / file)
        sync(self.directory)
        return places

    def read(self, places: Mapping[str, Place]) -> dict[str, Blob]:
        """Return the blobs at these places.

        Raises:
            OSError: the storage refuses.
            ValueError: a file is too short, or not the bytes that were saved.
        """
        found: dict[str, Blob] = {}
        for file in {place.file for place in places.values()}:
            whole = np.fromfile(self.directory / file, np.uint8)
            for name, place in places.items():
                if place.file == file:
                    # A copy, so that the rest of the file need not stay in memory.
                    found[name] = whole[place.start : place.start + place.length].copy()
        changed = [name for name, place in places.items() if zlib.crc32(found[name]) != place.checksum]
        if changed or any(found[name].nbytes != place.length for name, place in places.items()):
            raise ValueError(f"not the bytes that were saved: {changed[:5]}, {len(changed)} in all")
        self._known = {name: (found[name], Place(*place)) for name, place in places.items()}
        return {name: found[name] for name in places}

    def clean(self, steps: Iterable[Path]) -> None:
        """Delete the files that none of these checkpoints holds, if all can be read."""
        if not self.directory.is_dir():
            return
        # A step that is being saved, or failed and is tried again, is not among them.
        used = {place.file for _, place in self._known.values()}
        for step in steps:
            if step != self.directory:
                try:
                    used |= {place.file for place in read_manifest(epath.Path(step))["blobs"].values()}
                except Exception:
                    # Nobody knows what it holds.
                    return
        for path in self.directory.iterdir():
            if path.name not in used:
                path.unlink(missing_ok=True)
