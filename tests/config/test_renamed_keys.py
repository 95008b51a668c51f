"""Renamed keys of the config are answered with their new names: in files, flags, sections of flags and saved configs."""

import pytest

from jaxrl_llm.cli import read_config
from jaxrl_llm.config.renamed_keys import RENAMED, new_name
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.config.saved_config import differences
from jaxrl_llm.config.schema import types_at
from jaxrl_llm.errors import UserError


@pytest.mark.parametrize("old", RENAMED)
def test_the_new_name_exists_and_the_old_one_does_not(old):
    assert types_at(RENAMED[old].split("."), RunConfig) and not types_at(old.split("."), RunConfig)


def test_a_key_of_a_renamed_section_has_its_new_path(monkeypatch):
    monkeypatch.setitem(RENAMED, "learning.rule", "update.optimizer")
    assert new_name(["learning", "rule", "lr"]) == "update.optimizer.lr"
    assert new_name(["learning"]) is None and new_name(["learning", "rule2"]) is None


@pytest.mark.parametrize(
    ("text", "args", "name", "message"),
    [
        ("rollout: {support: 3}", [], "c.yaml: ", "rollout.support: got a key that was renamed, want rollout.max_kept_tokens"),
        ("", ["--rollout.support=3"], "", "--rollout.support: got a flag that was renamed, want --rollout.max_kept_tokens"),
        ("", ["--rollout", "{support: 3}"], "", "--rollout.support: got a key that was renamed, want --rollout.max_kept_tokens"),
    ],
)  # fmt: skip
def test_an_old_name_is_answered_with_the_new_one(tmp_path, text, args, name, message):
    """Beside all other errors."""
    path = tmp_path / "c.yaml"
    path.write_text(f"{text}\nsteps: -1\n")
    with pytest.raises(UserError) as error:
        read_config(str(path), args)
    where = f"{tmp_path}/{name}" if name else ""
    assert sorted(str(error.value).splitlines()) == sorted(
        [f"{where}{message}", f"{tmp_path}/c.yaml: steps: got -1, want 0 or more"]
    )


def test_an_old_name_in_the_saved_config_of_a_run(tmp_path):
    """When the run is named, and when a config is started in its directory."""
    path = tmp_path / "config.yaml"
    path.write_text("rollout: {support: 3}\n")
    message = f"{path}: rollout.support: got a key that was renamed, want rollout.max_kept_tokens"
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path), [])
    assert str(error.value) == message
    with pytest.raises(UserError) as error:
        differences(path, RunConfig())
    assert str(error.value).splitlines()[0] == message and f"correct {path}" in str(error.value)
