"""The cache of automata on disk: found again, never wrong, never an error."""

import os

import numpy as np
import pytest

from jaxrl_llm.control import cache
from jaxrl_llm.control.automaton import token_automaton
from jaxrl_llm.control.config import BudgetControl, ChoiceControl, JsonSchemaControl, RegexControl

CONTROL = ChoiceControl(texts=("a", "b"))


def made(seed: int):
    rng = np.random.default_rng(seed)
    return token_automaton(
        rng.integers(0, 3, 9), rng.integers(-1, 4, (4, 3)), rng.integers(0, 9, 4), 1, np.arange(4) == 3
    )


@pytest.fixture
def makes(monkeypatch, tmp_path):
    """Number of automata that were made; the cache is in `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def make():
        calls.append(len(calls))
        return made(len(calls))

    return make, calls


def files(tmp_path):
    return sorted((tmp_path / "jaxrl_llm" / "controls").iterdir())


def test_what_was_made_is_found_again_with_all_its_fields(makes, tmp_path):
    make, calls = makes
    first, again = cache.cached(CONTROL, "f", make), cache.cached(CONTROL, "f", make)
    assert calls == [0] and again.start == 1 and isinstance(again.start, int)
    for name in ("classes", "next", "distance", "ends", "forced", "replaces", "expires"):
        mine, other = getattr(first, name), getattr(again, name)
        assert np.array_equal(mine, other) and mine.dtype == other.dtype
    assert [path.suffix for path in files(tmp_path)] == [".npz"]


def test_another_control_tokenizer_or_code_is_another_file(makes, tmp_path, monkeypatch):
    make, calls = makes
    for control, fingerprint in [
        (CONTROL, "f"),
        (CONTROL, "g"),
        (ChoiceControl(texts=("a", "c")), "f"),
        (RegexControl("a"), "f"),
    ]:
        cache.cached(control, fingerprint, make)
    assert len(calls) == 4
    # The code is what the module's directory holds.
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "changed.py").write_text("x = 1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "code" / "cache.py"))
    cache.cached(CONTROL, "f", make)
    assert len(calls) == 5 and len(files(tmp_path)) == 5


@pytest.mark.parametrize("nested", [False, True])
def test_a_schema_file_that_changes_is_read_again(nested, makes, tmp_path):
    make, calls = makes
    path = tmp_path / "schema.json"
    control = JsonSchemaControl(path=str(path))
    control = BudgetControl(then=control) if nested else control
    for text, expected in (("{}", 1), ("{}", 1), ("true", 2)):
        path.write_text(text)
        cache.cached(control, "f", make)
        assert len(calls) == expected
    path.unlink()
    cache.cached(control, "f", make)  # reports the file, which is not the cache's matter
    assert len(calls) == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"not a zip"])
def test_a_broken_file_is_made_again(content, makes, tmp_path):
    make, calls = makes
    cache.cached(CONTROL, "f", make)
    files(tmp_path)[0].write_bytes(content)
    cache.cached(CONTROL, "f", make)
    cache.cached(CONTROL, "f", make)
    assert len(calls) == 2


def test_a_cut_off_or_foreign_file_is_made_again(makes, tmp_path):
    make, calls = makes
    cache.cached(CONTROL, "f", make)
    whole = files(tmp_path)[0].read_bytes()
    files(tmp_path)[0].write_bytes(whole[: len(whole) // 2])
    cache.cached(CONTROL, "f", make)
    np.savez(files(tmp_path)[0], other=np.zeros(3))
    cache.cached(CONTROL, "f", make)
    assert len(calls) == 3 and files(tmp_path)[0].read_bytes() != whole


def test_a_directory_that_cannot_be_written_is_no_error(makes, tmp_path):
    make, calls = makes
    (tmp_path / "jaxrl_llm").write_text("a file in the way")
    cache.cached(CONTROL, "f", make)
    cache.cached(CONTROL, "f", make)
    assert len(calls) == 2


def test_a_failure_while_writing_leaves_nothing(makes, tmp_path, monkeypatch):
    make, _ = makes

    def full(file, **fields):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert cache.cached(CONTROL, "f", make).start == 1
    assert files(tmp_path) == []


def test_what_was_used_last_is_kept(makes, tmp_path, monkeypatch):
    make, calls = makes
    for fingerprint in "abc":
        cache.cached(CONTROL, fingerprint, make)
    ages = {path: os.utime(path, (at, at)) for at, path in enumerate(files(tmp_path))}
    oldest, size = min(ages, key=lambda path: path.stat().st_mtime), files(tmp_path)[0].stat().st_size
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size + size // 2)
    cache.cached(CONTROL, "d", make)
    assert len(files(tmp_path)) == 3 and oldest not in files(tmp_path)
    # Used, so no longer the oldest.
    used = next(f for f in "abc" if (tmp_path / "jaxrl_llm" / "controls" / f"{cache._key(CONTROL, f)}.npz").exists())
    cache.cached(CONTROL, used, make)
    cache.cached(CONTROL, "e", make)
    assert (tmp_path / "jaxrl_llm" / "controls" / f"{cache._key(CONTROL, used)}.npz").exists()
    assert len(calls) == 5


def test_the_cache_is_in_the_home_directory_without_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache.cached(CONTROL, "f", lambda: made(0))
    assert len(files(tmp_path / ".cache")) == 1
