import asyncio
import errno
import functools
import importlib
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.handlers import json_checkpoint_handler

from jaxrl_llm.checkpoint import manifest, store
from jaxrl_llm.checkpoint.fingerprint import fingerprint
from jaxrl_llm.checkpoint.run_directory import RunLock, prepare_run_directory
from jaxrl_llm.checkpoint.store import Checkpoints
from jaxrl_llm.errors import CheckpointError, NonFiniteError, UserError

# Orbax drops the other readers and writers of a step when one of them fails; TensorStore then speaks to their closed event loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)

AUTO = jax.sharding.AxisType.Auto


def place(shape: tuple[int, ...], *spec: str | None) -> NamedSharding:
    names = ("a", "b")[: len(shape)]
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return NamedSharding(jax.sharding.Mesh(devices, names, axis_types=(AUTO,) * len(shape)), PartitionSpec(*spec))


LAYOUTS = {
    "eight": (place((8,), "a"), place((8,))),
    "two_by_four": (place((2, 4), "b", "a"), place((2, 4))),
    "one": (place((1,)), place((1,))),
}


def make_tree(seed: int, layout: str = "eight") -> dict:
    split, whole = LAYOUTS[layout]
    rng = np.random.default_rng(seed)
    host = {
        "w": rng.standard_normal((16, 8)).astype(np.float32),
        "layers": [rng.standard_normal((8, 16)).astype(jnp.bfloat16) for _ in range(2)],
        "mask": rng.random((8, 8)) < 0.5,
    }
    tree = jax.tree.map(lambda x: jax.device_put(x, split), host)
    return tree | {
        "step": jax.device_put(np.int32(seed), whole),
        "empty": jax.device_put(np.zeros((0, 4), np.float32), whole),
        "cursor": np.asarray(2**40 + seed),
        "score": np.asarray(float("nan")),
        "replay": {"tokens": rng.integers(0, 2**31, (3, 5), np.int32), "none": np.zeros((0,), np.int64)},
    }


def target_of(meta: dict | None = None, layout: str = "eight") -> dict:
    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(shape, make_tree(0, layout))


def assert_same(got: dict, want: dict) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def saved(directory: Path, steps: tuple[int, ...], keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, make_tree(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def fail_saves(monkeypatch, times: int) -> list[int]:
    """The next `times` saves meet a full disk in Orbax's background thread; the list has one entry for each that did."""
    met, write = [], json_checkpoint_handler.JsonCheckpointHandler._save_fn

    async def full(self, item, directory):
        if len(met) < times:
            met.append(1)
            await asyncio.sleep(0.2)
            raise OSError(errno.ENOSPC, "No space left on device")
        return await write(self, item, directory)

    monkeypatch.setattr(json_checkpoint_handler.JsonCheckpointHandler, "_save_fn", full)
    return met


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    saved(directory, (35, 40)).close()
    return directory


def copy_of(directory: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(directory, to))


# ---- round trip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_restores_the_same_bits_on_any_mesh(two_steps, layout):
    restored = Checkpoints(two_steps).restore(lambda _: target_of(layout=layout))
    assert (restored.step, restored.meta) == (40, {"step": 40})
    assert_same(restored.tree, make_tree(40, layout))
    assert restored.tree["w"].sharding == LAYOUTS[layout][0]
    assert fingerprint(restored.tree) == fingerprint(make_tree(40, "one"))


def test_a_target_without_sharding_goes_to_one_device(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.arange(4.0)}, {})
    assert_same(
        checkpoints.restore(lambda _: {"x": jax.ShapeDtypeStruct((4,), np.float32)}).tree, {"x": jnp.arange(4.0)}
    )
    checkpoints.close()


def test_meta_comes_back_as_json_gives_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    meta = {"offsets": {"metrics.jsonl": 2**50}, "name": "数学", "best": float("inf"), "list": [1, None, 0.1]}
    checkpoints.save(1, {"x": np.zeros(1)}, meta)
    assert checkpoints.restore(lambda _: {"x": np.zeros(1)}).meta == meta
    checkpoints.close()


def test_each_step_is_read_into_what_its_own_meta_asks_for(tmp_path):
    """The newer step holds more leaves than the one before, and cannot be read."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": np.arange(2)}, {"size": 2, "more": False})
    checkpoints.save(2, {"x": np.arange(3), "y": np.zeros(1)}, {"size": 3, "more": True})
    checkpoints.wait()

    def target(meta):
        return {"x": np.zeros(meta["size"], int)} | ({"y": np.zeros(1)} if meta["more"] else {})

    assert_same(checkpoints.restore(target).tree, {"x": np.arange(3), "y": np.zeros(1)})
    shutil.rmtree(tmp_path / "2" / "state")
    assert_same(checkpoints.restore(target).tree, {"x": np.arange(2)})
    checkpoints.close()


def test_nothing_saved_gives_none(tmp_path):
    assert Checkpoints(tmp_path / "not there").restore(target_of) is None
    assert not (tmp_path / "not there").exists()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(tmp_path).restore(target_of) is None


# ---- fingerprint


SMALL, LARGE = ("float32", "bfloat16", "int32", "uint8", "bool"), ("int64", "float64", "complex128")


@pytest.mark.parametrize(("dtype", "on_device"), [*((d, True) for d in SMALL), *((d, False) for d in SMALL + LARGE)])
def test_every_flipped_bit_changes_the_fingerprint(dtype, on_device):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((9, 7)) * 100).astype(jnp.dtype(dtype))
    put = jnp.asarray if on_device else np.asarray
    before = fingerprint([put(x)])
    for _ in range(40):
        changed = x.copy()
        flat = changed.view(np.uint8).reshape(-1)
        place = rng.integers(flat.size)
        flat[place] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
        assert fingerprint([put(changed)]) != before


@pytest.mark.parametrize("put", [jnp.asarray, np.asarray])
def test_moves_and_pairs_of_signs_change_the_fingerprint(put):
    x = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)
    swapped, negated = x.copy(), x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    negated[2:4] *= -1
    assert (
        len({fingerprint([put(y)])["[0]"] for y in (x, swapped, negated, np.zeros_like(x), np.zeros(0, np.float32))})
        == 5
    )


def test_the_fingerprint_is_the_same_on_host_and_device_and_every_mesh():
    found = [fingerprint(make_tree(3, layout)) for layout in LAYOUTS]
    assert found[0] == found[1] == found[2] == fingerprint(jax.tree.map(np.asarray, make_tree(3)))
    assert found[0]["['empty']"] == 0 and "['layers'][1]" in found[0]


def test_the_fingerprint_of_eight_byte_words_by_hand():
    def mix(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x

    want = (mix(7) + mix(5 ^ 0x9E3779B1)) % 2**32
    assert fingerprint({"n": np.asarray((5 << 32) + 7)}) == {"['n']": want}
    with jax.enable_x64(True):
        assert fingerprint({"n": jnp.asarray((5 << 32) + 7)}) == {"['n']": want}


# ---- damage


def test_every_truncated_or_deleted_file_is_survived(two_steps, tmp_path, caplog):
    names = [p.relative_to(two_steps) for p in (two_steps / "40").rglob("*") if p.is_file()]
    assert len(names) > 8
    moved = set()
    for name in names:
        for damage in ("truncate", "delete"):
            directory = copy_of(two_steps, tmp_path / "copy")
            path = directory / name
            os.truncate(path, path.stat().st_size // 2) if damage == "truncate" else path.unlink()
            caplog.clear()
            restored = Checkpoints(directory).restore(target_of)
            assert_same(restored.tree, make_tree(restored.step))
            assert restored.step == restored.meta["step"]
            if restored.step == 35:
                moved.add((str(name), damage))
                assert "step 40 unreadable (" in caplog.text and "using step 35; moved to" in caplog.text
                assert (directory / "corrupt-40").is_dir() and not (directory / "40").exists()
    # How many files the numbers lie in differs from save to save; these two every checkpoint has and needs.
    needed = ("40/meta/metadata", "40/state/manifest.ocdbt")
    assert moved >= {(name, damage) for name in needed for damage in ("truncate", "delete")}


def test_a_flipped_bit_never_gives_wrong_numbers(two_steps, tmp_path):
    rng = random.Random(0)
    data = [p.relative_to(two_steps) for p in (two_steps / "40").rglob("*") if p.is_file() and p.stat().st_size]
    fallen = 0
    for _ in range(30):
        directory = copy_of(two_steps, tmp_path / "copy")
        path = directory / rng.choice(data)
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        restored = Checkpoints(directory).restore(target_of)
        assert_same(restored.tree, make_tree(restored.step))
        fallen += restored.step == 35
    assert fallen >= 5


def test_a_flipped_bit_in_the_numbers_is_seen_by_the_fingerprint(tmp_path, caplog):
    # Random words do not compress, so the middle of the largest file is numbers, over which Orbax keeps no checksum.
    numbers = np.random.default_rng(0).integers(0, 2**32, 2**16, np.uint32)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.asarray(numbers), "y": numbers}, {})
    checkpoints.wait()
    path = max((p for p in (tmp_path / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    restored = checkpoints.restore(lambda _: {"x": jax.ShapeDtypeStruct((2**16,), np.uint32), "y": numbers})
    assert restored.step == 1 and (np.asarray(restored.tree["x"]) == numbers).all()
    assert re.search(r"not the bits that were saved: \[\"\['[xy]'\]\"\], 1 in all", caplog.text)
    checkpoints.close()


def test_no_readable_step_is_an_error_and_stays_one(two_steps, tmp_path):
    directory = copy_of(two_steps, tmp_path / "copy")
    for step in (35, 40):
        shutil.rmtree(directory / str(step) / "state")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint can be read"):
            Checkpoints(directory).restore(target_of)
    assert sorted(p.name for p in directory.iterdir()) == ["corrupt-35", "corrupt-40"]


def test_after_falling_back_the_same_steps_are_saved_again(two_steps, tmp_path):
    directory = copy_of(two_steps, tmp_path / "copy")
    (directory / "corrupt-40").mkdir()
    shutil.rmtree(directory / "40" / "state")
    checkpoints = Checkpoints(directory)
    assert checkpoints.restore(target_of).step == 35
    assert (directory / "corrupt-40-again").is_dir()
    for step in (36, 40):
        checkpoints.save(step, make_tree(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [35, 36, 40]
    assert_same(checkpoints.restore(target_of).tree, make_tree(40))
    checkpoints.close()


def test_foreign_files_change_nothing(two_steps, tmp_path):
    directory = copy_of(two_steps, tmp_path / "copy")
    for name in (".DS_Store", "39", "41", "50"):
        (directory / name).write_text("a file", encoding="utf-8")
    for name in ("lost+found", "99.bak", "007", "8.orbax-checkpoint-tmp", "trash/2", "corrupt-77", "state_88"):
        (directory / name).mkdir(parents=True)
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [35, 40]
    assert checkpoints.restore(target_of).step == 40
    for step in (41, 42, 43):
        checkpoints.save(step, make_tree(step), {})
    checkpoints.close()
    assert checkpoints.steps() == [41, 42, 43]
    names = {p.name for p in directory.iterdir()}
    assert not names & {"trash", "8.orbax-checkpoint-tmp"}
    assert names >= {"lost+found", "99.bak", ".DS_Store", "corrupt-77"}


def test_another_config_is_named_and_nothing_is_moved(two_steps):
    good = target_of()
    cases = {
        "['w']: saved float32[16,8], want bfloat16[16,8]": good
        | {"w": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=LAYOUTS["eight"][0])},
        "['cursor']: saved int64[], want int32[]": good | {"cursor": np.int32(0)},
        "['replay']['tokens']: saved int32[3,5], want int32[3,6]": good
        | {"replay": good["replay"] | {"tokens": np.zeros((3, 6), np.int32)}},
        "['more']: saved nothing, want float32[1]": good | {"more": np.zeros(1, np.float32)},
        "['mask']: saved bool[8,8], want nothing": {k: v for k, v in good.items() if k != "mask"},
    }
    for message, target in cases.items():
        with pytest.raises(UserError) as caught:
            Checkpoints(two_steps).restore(lambda _, target=target: target)
        assert message in str(caught.value) and not isinstance(caught.value, CheckpointError)
    with pytest.raises(UserError) as caught:
        Checkpoints(two_steps).restore(lambda _: {f"x{i}": np.zeros(1) for i in range(9)})
    assert str(caught.value).count("saved") == store.SHOWN_PATHS
    assert Checkpoints(two_steps).steps() == [35, 40]


def test_an_older_machine_does_not_move_good_steps_away(two_steps, monkeypatch):
    def too_small(*_, **__):
        raise MemoryError

    monkeypatch.setattr(store.ocp.PyTreeCheckpointHandler, "restore", too_small)
    with pytest.raises(MemoryError):
        Checkpoints(two_steps).restore(target_of)
    assert Checkpoints(two_steps).steps() == [35, 40]


# ---- a storage that fails for a while


PASSING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT)


class FailingReads:
    """Make `times` of the opens and listings below `directory` fail, from number `first` on."""

    def __init__(self):
        self.directory, self.first, self.times, self.seen = None, 0, 0, 0
        # Never to be taken away again, so there is one of them, idle without a directory.
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if self.directory is None or event not in ("open", "os.scandir", "os.listdir"):
            return
        if not str(args[0]).startswith(str(self.directory)):
            return
        self.seen += 1
        if self.first <= self.seen < self.first + self.times:
            number = PASSING[self.first % len(PASSING)]
            raise OSError(number, os.strerror(number), str(args[0]))

    def begin(self, directory: Path, first: int, times: int) -> None:
        self.directory, self.first, self.times, self.seen = directory, first, times, 0


@pytest.fixture(scope="module")
def failing_reads():
    return FailingReads()


@pytest.fixture
def pauses(monkeypatch):
    """Functions called in place of the pauses before a read is tried again."""
    called = []
    monkeypatch.setattr(store, "PAUSES", (0.011, 0.011))
    sleep = time.sleep
    monkeypatch.setattr(store.time, "sleep", lambda s: [f() for f in called] if s == 0.011 else sleep(s))
    return called


def assert_nothing_moved(directory: Path) -> None:
    assert sorted(p.name for p in directory.iterdir()) == ["35", "40"]


def test_no_read_error_moves_a_good_step(two_steps, pauses, failing_reads):
    first, ended = 0, 0
    while True:
        first += 1
        failing_reads.begin(two_steps, first, times=1)
        assert Checkpoints(two_steps).restore(target_of).step == 40
        if failing_reads.seen < first:
            break
        failing_reads.begin(two_steps, first, times=10**9)
        try:
            assert Checkpoints(two_steps).restore(target_of).step == 40
        except CheckpointError as error:
            ended += 1
            assert "the storage does not give it, after 3 tries (" in str(error) and "\n" not in str(error)
        failing_reads.directory = None
        assert_nothing_moved(two_steps)
    failing_reads.directory = None
    assert first > 5 and ended > 3


def test_no_file_that_cannot_be_opened_moves_a_good_step(two_steps, tmp_path, pauses):
    """A link to itself: whoever opens it fails, TensorStore's C++ too, and who asks whether it is there hears that it is not."""
    for name in [p.relative_to(two_steps) for p in (two_steps / "40").rglob("*") if p.is_file()]:
        directory = copy_of(two_steps, tmp_path / "copy")
        path = directory / name
        good = path.rename(tmp_path / "good")
        path.symlink_to(path)
        pauses[:] = []
        try:
            assert Checkpoints(directory).restore(target_of).step == 40
        except CheckpointError as error:
            assert "the storage does not give it" in str(error), name
            assert_nothing_moved(directory)
            pauses[:] = [lambda good=good, path=path: os.replace(good, path) if good.exists() else None]
            assert_same(Checkpoints(directory).restore(target_of).tree, make_tree(40))
        assert_nothing_moved(directory)


def caused(text: str) -> Exception:
    """As Orbax wraps what TensorStore raises."""
    error = Exception("Encountered error while reading array index")
    error.__cause__ = ValueError(text)
    return error


READING = 'Error reading "w/0.0" in OCDBT database at local file "/runs/x/1/state/"'
REFUSALS = [
    OSError(errno.EIO, "Input/output error"),
    TimeoutError("no answer"),
    caused(
        f"UNKNOWN: {READING}: Failed to read: Input/output error [os_error_code='5' source locations='os_error.cc:63']"
    ),
    caused(f"FAILED_PRECONDITION: {READING}: Stale file handle [os_error_code='116']"),
    *(ValueError(f"{status}: {READING}") for status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("error", REFUSALS, ids=str)
def test_a_read_that_fails_in_the_middle_of_a_file_moves_no_step(two_steps, pauses, monkeypatch, error):
    """Every file can be opened, and its first byte read."""
    handler, left = store.ocp.PyTreeCheckpointHandler, [error] * 4
    restore = handler.restore

    def refused(self, *args, **kwargs):
        if left:
            raise left.pop()
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(handler, "restore", refused)
    with pytest.raises(CheckpointError, match="does not give it, after 3 tries"):
        Checkpoints(two_steps).restore(target_of)
    assert Checkpoints(two_steps).restore(target_of).step == 40
    assert_nothing_moved(two_steps)


def test_too_many_open_files_move_no_step(two_steps, pauses):
    # pytest imports it to report what was left open, which fails when no file can be opened.
    importlib.import_module("tracemalloc")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
        with pytest.raises(CheckpointError, match=r"does not give it.*Too many open files"):
            Checkpoints(two_steps).restore(target_of)
        pauses.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
        assert Checkpoints(two_steps).restore(target_of).step == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_nothing_moved(two_steps)


# What the processes of a job agree on, two questions a try: did all read it, and was none refused by the storage?
REFUSED, WRONG = [False, False], [False, True]


@pytest.mark.parametrize(
    ("elsewhere", "step"), [(REFUSED * 2, 40), (REFUSED + WRONG, 40), (WRONG + REFUSED + WRONG, 35)]
)
def test_what_another_process_cannot_read_counts_as_if_read_here(
    two_steps, tmp_path, pauses, monkeypatch, elsewhere, step
):
    directory = copy_of(two_steps, tmp_path / "copy")
    # The first question of a restore is about the list of steps.
    answers = [True, *elsewhere]
    monkeypatch.setattr(store.hosts, "all_agree", lambda mine: answers.pop(0) if answers else mine)
    restored = Checkpoints(directory).restore(target_of)
    assert restored.step == step
    assert sorted(p.name for p in directory.iterdir()) == (["35", "40"] if step == 40 else ["35", "corrupt-40"])


def test_who_only_looks_moves_nothing(two_steps, tmp_path, caplog):
    directory = copy_of(two_steps, tmp_path / "copy")
    shutil.rmtree(directory / "40" / "state")
    assert Checkpoints(directory).restore(target_of, owned=False).step == 35
    assert "using step 35; it is left where it is" in caplog.text
    assert_nothing_moved(directory)


# ---- saving


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def update(state):
        return jax.tree.map(lambda x: x * 0 - 1, state)

    for trial, sharding in enumerate((place((8,), "a"), place((8,)), place((1,)))):
        checkpoints = Checkpoints(tmp_path / str(trial))
        state = {str(i): jax.device_put(np.full((128, 1024), i, np.float32), sharding) for i in range(8)}
        state = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s))(state)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        host = np.arange(6)
        checkpoints.save(1, {"state": state, "host": host}, {})
        host[:] = -1
        for _ in range(10):
            state = update(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(lambda _, target=target: {"state": target, "host": np.arange(6)}).tree
        for i in range(8):
            assert (np.asarray(restored["state"][str(i)]) == i + 1).all()
        assert restored["host"].tolist() == [0, 1, 2, 3, 4, 5]
        checkpoints.close()


def test_later_saves_compile_nothing(tmp_path):
    compiled = []

    def count(event: str, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    checkpoints = saved(tmp_path, (1,))
    trees = [make_tree(step) for step in (2, 3)]
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for step, tree in zip((2, 3), trees, strict=True):
            checkpoints.save(step, tree, {})
            checkpoints.poll()
        checkpoints.wait()
        assert compiled == []
        jnp.zeros((3, 1, 4, 1, 5)).block_until_ready()
        assert compiled, "the counter counts"
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    checkpoints.close()


def test_the_oldest_goes_and_the_trash_is_emptied(tmp_path):
    checkpoints = saved(tmp_path, (1, 2, 3, 4), keep=2)
    assert checkpoints.steps() == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]
    checkpoints.close()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    checkpoints, good = saved(tmp_path, (1,)), make_tree(2)
    for value in (np.nan, np.inf, -np.inf):
        layer = jax.device_put(good["layers"][1].at[3, 5].set(value), good["layers"][1].sharding)
        with pytest.raises(NonFiniteError, match=r"after step 2 is not finite; not saved: \['layers'\]\[1\], 1 in all"):
            checkpoints.save(2, good | {"layers": [good["layers"][0], layer]}, {})
    # A NaN on the host stands for what was not measured.
    assert np.isnan(good["score"])
    checkpoints.save(2, good, {})
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_a_doubtful_step_pushes_no_other_out(tmp_path):
    checkpoints = saved(tmp_path, (1, 2), keep=2)
    for step in (3, 4):
        checkpoints.save(step, make_tree(step), {}, prune=False)
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3, 4]
    assert [path.name for path in checkpoints.condemn(3)] == ["condemned-3", "condemned-4"]
    assert Checkpoints(tmp_path).restore(target_of).step == 2
    checkpoints.save(3, make_tree(3), {})
    checkpoints.close()
    assert checkpoints.steps() == [2, 3] and (tmp_path / "condemned-4").is_dir()


def test_a_save_that_never_ends_is_reported(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, (1,))
    release, write = threading.Event(), json_checkpoint_handler.JsonCheckpointHandler._save_fn

    async def stuck(self, item, directory):
        release.wait(20)
        return await write(self, item, directory)

    monkeypatch.setattr(json_checkpoint_handler.JsonCheckpointHandler, "_save_fn", stuck)
    monkeypatch.setattr(store, "SAVE_DEADLINE", 1)
    checkpoints.save(2, make_tree(2), {})
    try:
        with pytest.raises(
            CheckpointError, match="step 2 was not saved: TimeoutError: the storage has not taken it in 1 s"
        ):
            checkpoints.close()
    finally:
        release.set()


def test_a_step_that_is_not_newer_is_an_error(tmp_path):
    checkpoints = saved(tmp_path, (5,))
    for step in (4, 5):
        with pytest.raises(CheckpointError, match=rf"got step {step} to save, want one newer than \[5\]"):
            checkpoints.save(step, make_tree(step), {})
    checkpoints.close()


def wait_for_end(checkpoints: Checkpoints) -> None:
    deadline = time.monotonic() + 10
    while checkpoints._pending is not None and time.monotonic() < deadline:
        checkpoints.poll()
        time.sleep(0.002)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_costs_one_save(tmp_path, monkeypatch, caplog, keep):
    checkpoints = saved(tmp_path, (3,), keep)
    fail_saves(monkeypatch, times=2)
    for step in (4, 5):
        checkpoints.save(step, make_tree(step), {})
        wait_for_end(checkpoints)
        assert f"step {step} was not saved: disk full: " in caplog.text
        # 512 bytes of w, 512 of layers, 64 of mask, 60 of tokens, 4 + 8 + 8 of the numbers.
        assert f" free in {tmp_path}, the step needs about 1.2 kB; trying again" in caplog.text
        checkpoints.poll()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]
    checkpoints.save(6, make_tree(6), {})
    wait_for_end(checkpoints)
    assert checkpoints.steps() == [3, 6][-keep:]
    assert_same(checkpoints.restore(target_of).tree, make_tree(6))
    assert not [record for record in caplog.records if "orbax" in record.pathname]
    checkpoints.close()


def test_the_third_failure_in_a_row_ends_the_run(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, (3,))
    fail_saves(monkeypatch, times=9)
    # The second failure is only met by the third save.
    checkpoints.save(4, make_tree(4), {})
    wait_for_end(checkpoints)
    checkpoints.save(5, make_tree(5), {})
    checkpoints.save(6, make_tree(6), {})
    with pytest.raises(CheckpointError, match=r"step 6 was not saved.*3 consecutive saves failed.*\[3\]"):
        wait_for_end(checkpoints)
    checkpoints.close()
    monkeypatch.undo()
    assert Checkpoints(tmp_path).restore(target_of).step == 3


def test_wait_and_close_raise_what_went_wrong(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, (3,))
    fail_saves(monkeypatch, times=2)
    for step, end in ((4, checkpoints.wait), (5, checkpoints.close)):
        checkpoints.save(step, make_tree(step), {})
        with pytest.raises(CheckpointError, match=f"step {step} was not saved: disk full"):
            end()
    checkpoints.close()


def test_an_error_while_the_save_starts_is_counted_too(tmp_path, caplog):
    (tmp_path / "file").write_text("", encoding="utf-8")
    checkpoints = Checkpoints(tmp_path / "file" / "below")
    for step in (1, 2):
        checkpoints.save(step, make_tree(1), {})
    assert "NotADirectoryError" in caplog.text
    with pytest.raises(CheckpointError, match="3 consecutive saves failed"):
        checkpoints.save(3, make_tree(1), {})


LOOP = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
import numpy as np
from jaxrl_llm.checkpoint.store import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
target = {"w": jax.ShapeDtypeStruct((64, 1024), np.float32), "n": np.asarray(0)}
restored = checkpoints.restore(lambda meta: target)
step = restored.step if restored else 0
if restored:
    assert (np.asarray(restored.tree["w"]) == step).all() and restored.tree["n"] == step
print("at", step, flush=True)
while True:
    step += 1
    checkpoints.save(step, {"w": jnp.full((64, 1024), float(step)), "n": np.asarray(step)}, {})
    if step % 3:
        checkpoints.wait()
        print("saved", step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_sigkill_at_any_moment_loses_no_confirmed_step(tmp_path, kills):
    rng, confirmed = random.Random(0), 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        first = process.stdout.readline().split()
        assert first and first[0] == "at" and int(first[1]) >= confirmed, "the restore failed or went back"
        lines = [process.stdout.readline() for _ in range(rng.randrange(1, 6))]
        time.sleep(rng.uniform(0, 0.08))
        process.send_signal(signal.SIGKILL)
        lines += process.communicate()[0].splitlines(keepends=True)
        confirmed = max([int(first[1]), *(int(line.split()[1]) for line in lines if line.endswith("\n"))])
    assert confirmed > kills
    target = {"w": jax.ShapeDtypeStruct((64, 1024), np.float32), "n": np.asarray(0)}
    restored = Checkpoints(tmp_path).restore(lambda _: target)
    assert restored.step >= confirmed and (np.asarray(restored.tree["w"]) == restored.step).all()
    assert not list(tmp_path.glob("corrupt-*"))
    assert len(Checkpoints(tmp_path).steps()) <= 4


# ---- the run directory

HOLD = """
import sys, time
from pathlib import Path
from jaxrl_llm.checkpoint.run_directory import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by pid {process.pid} on .* since 2\d\d\d-") as caught:
            RunLock(tmp_path).__enter__()
        assert str(tmp_path) in str(caught.value)
    finally:
        process.kill()
        process.communicate()
    with RunLock(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / "lock").read_text(encoding="utf-8")
        with pytest.raises(UserError, match=f"pid {os.getpid()}"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_a_run_directory_is_proved_writable(tmp_path):
    prepare_run_directory(tmp_path / "a" / "b")
    prepare_run_directory(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing/here")):
        with pytest.raises(UserError, match=str(path)):
            prepare_run_directory(path)


def test_orbax_is_silent(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    saved(tmp_path, (1, 2)).close()
    assert not [record for record in caplog.records if "orbax" in record.pathname]


def test_readers_that_orbax_left_behind_write_no_tracebacks():
    source = "async def read():\n    try:\n        await forever()\n    finally:\n        raise ValueError('left')"
    reported = []
    for path in ("/site-packages/orbax/checkpoint/reader.py", "/mine/reader.py"):
        names = {"forever": lambda: asyncio.sleep(9)}
        exec(compile(source, path, "exec"), names)
        reader = names["read"]()
        store._without_orbax(SimpleNamespace(exc_value=ValueError("left"), object=reader), reported.append)
        reader.close()
    assert [each.object.cr_code.co_filename for each in reported] == ["/mine/reader.py"]


@pytest.mark.parametrize("text", ["[]", "3", '{"text": 3, "sha256": ""}', "{", '{"text": "{}", "sha256": ""}'])
def test_a_newest_step_with_a_broken_description_is_no_other_format(tmp_path, caplog, text):
    """However it is broken, the one before is taken."""
    tree, checkpoints = {"x": np.arange(3)}, Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree, {})
    checkpoints.wait()
    (tmp_path / "2" / "meta" / "metadata").write_text(text)
    checkpoints.refuse_other_formats()
    assert checkpoints.restore(lambda meta: tree).step == 1
    assert (tmp_path / "corrupt-2").is_dir()


def test_a_step_of_another_format_is_refused_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 5)
    tree, checkpoints = {"x": np.arange(3)}, Checkpoints(tmp_path)
    checkpoints.save(7, tree, {})
    checkpoints.wait()
    monkeypatch.undo()
    for refuses in (checkpoints.refuse_other_formats, lambda: checkpoints.restore(lambda meta: tree)):
        with pytest.raises(UserError, match=r"7: got a checkpoint of format 5, .* want 6"):
            refuses()
    assert checkpoints.steps() == [7]
