"""Blobs of checkpoints: written once, found again, never lost while a step holds them, and a changed bit is noticed."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.checkpoint.blobs import Blobs
from jaxrl_llm.checkpoint.store import Checkpoints


def blob(seed: int, size: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def tree(step: int) -> dict:
    return {"step": np.array(step)}


def files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (directory / "blobs").glob("*")}


def same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)


def restored(directory: Path):
    return Checkpoints(directory).restore(lambda meta: tree(0))


def test_only_what_is_new_is_written(tmp_path):
    """40 groups, then 10 more, then nothing new: three steps whose files have 4,000, 1,000 and no bytes."""
    checkpoints, held = Checkpoints(tmp_path, 3), {str(n): blob(n) for n in range(40)}
    checkpoints.save(1, tree(1), {}, blobs=held)
    held |= {str(n): blob(n) for n in range(40, 50)}
    checkpoints.save(2, tree(2), {}, blobs=held)
    checkpoints.save(3, tree(3), {}, blobs=held)
    checkpoints.close()
    assert sorted(files(tmp_path).values()) == [1000, 4000]
    found = restored(tmp_path)
    assert found.step == 3
    same(found.blobs, held)


def test_what_was_restored_is_not_written_again(tmp_path):
    held = {str(n): blob(n) for n in range(9)}
    with_blobs = Checkpoints(tmp_path)
    with_blobs.save(1, tree(1), {}, blobs=held)
    with_blobs.close()
    after = Checkpoints(tmp_path)
    found = after.restore(lambda meta: tree(0))
    after.save(2, tree(2), {}, blobs=found.blobs | {"9": blob(9)})
    after.close()
    assert sorted(files(tmp_path).values()) == [100, 900]
    same(restored(tmp_path).blobs, held | {"9": blob(9)})


def test_another_array_of_the_same_name_is_another_blob(tmp_path):
    """As after a resume from an older step, from which a run continued differently."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(1), {}, blobs={"0": blob(0)})
    checkpoints.save(2, tree(2), {}, blobs={"0": blob(7)})
    checkpoints.close()
    same(restored(tmp_path).blobs, {"0": blob(7)})
    shutil.rmtree(tmp_path / "2")
    same(restored(tmp_path).blobs, {"0": blob(0)})


def test_a_file_of_which_little_is_used_is_written_anew_and_the_old_one_deleted(tmp_path):
    """Six of ten blobs remain, then four: at four of ten they move."""
    held = {str(n): blob(n) for n in range(10)}
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, tree(1), {}, blobs=held)
    checkpoints.save(2, tree(2), {}, blobs={n: held[n] for n in "012345"})
    checkpoints.wait()
    assert list(files(tmp_path).values()) == [1000]
    checkpoints.save(3, tree(3), {}, blobs={n: held[n] for n in "0123"})
    checkpoints.wait()
    assert list(files(tmp_path).values()) == [400]
    same(restored(tmp_path).blobs, {n: held[n] for n in "0123"})


def test_steps_that_were_moved_aside_keep_their_blobs(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, tree(1), {}, blobs={"0": blob(0)})
    checkpoints.save(2, tree(2), {}, prune=False, blobs={"0": blob(0), "1": blob(1, 50)})
    checkpoints.condemn(2)
    checkpoints.save(3, tree(3), {}, blobs={})
    checkpoints.close()
    assert 150 in files(tmp_path).values()
    shutil.rmtree(tmp_path / "3")
    (tmp_path / "condemned-2").rename(tmp_path / "2")
    same(restored(tmp_path).blobs, {"0": blob(0), "1": blob(1, 50)})


def test_a_step_whose_manifest_cannot_be_read_protects_all_files(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, tree(1), {}, blobs={"0": blob(0)})
    checkpoints.wait()
    (tmp_path / "corrupt-1").mkdir()
    checkpoints.save(2, tree(2), {}, blobs={"1": blob(1)})
    checkpoints.close()
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_costs_its_step_and_no_other(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(1), {}, blobs={"0": blob(0)})
    checkpoints.wait()
    before = set(files(tmp_path))
    checkpoints.save(2, tree(2), {}, blobs={"1": blob(1), "2": blob(2)})
    checkpoints.close()
    [name] = set(files(tmp_path)) - before
    path = tmp_path / "blobs" / name
    if damage == "remove":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[150] ^= 1
        path.write_bytes(content if damage == "flip" else content[:150])
    with caplog.at_level(logging.WARNING):
        found = restored(tmp_path)
    assert found.step == 1 and "step 2 unreadable" in caplog.text and (tmp_path / "corrupt-2").is_dir()
    same(found.blobs, {"0": blob(0)})


def test_a_reader_beside_a_running_process_takes_no_blobs(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(1), {}, blobs={"0": blob(0)})
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(lambda meta: tree(0), owned=False).blobs == {}


def test_storage_that_refuses_is_an_oserror_and_the_next_save_writes(tmp_path):
    (tmp_path / "blobs").write_text("no directory")
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(OSError):
        checkpoints.save(1, tree(1), {}, blobs={"0": blob(0)})
    (tmp_path / "blobs").unlink()
    checkpoints.save(1, tree(1), {}, blobs={"0": blob(0)})
    checkpoints.close()
    same(restored(tmp_path).blobs, {"0": blob(0)})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 7)), st.booleans()), min_size=1, max_size=8))
def test_any_sequence_of_saves_and_restores_against_a_dict(tmp_path_factory, steps):
    """Directly, without Orbax: the places of the last two saves are always readable, and files hold at most twice what is used."""
    directory = tmp_path_factory.mktemp("blobs") / "b"
    blobs, made, kept = Blobs(directory), {}, []
    for number, (names, again) in enumerate(steps):
        if again and kept:
            blobs = Blobs(directory)
            made |= blobs.read(kept[-1][1])
        held = {str(n): made.setdefault(str(n), blob(n, 10 + n)) for n in sorted(names)}
        kept = [*kept, (held, blobs.save(number, held))][-2:]
        for want, places in kept:
            got = Blobs(directory).read(places)
            same(got, want)
        files_used = {place.file for place in kept[-1][1].values()}
        used = sum(place.length for place in kept[-1][1].values())
        assert sum((directory / file).stat().st_size for file in files_used) <= 2 * used
