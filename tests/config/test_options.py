"""Configs made in a script."""

import pytest

from jaxrl_llm.config.options import with_options
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig


def test_options_replace_fields_and_leave_the_rest():
    engine = EngineConfig(window=64)
    got = with_options(RolloutConfig(prompts=3, engine=engine), {"samples": 2, "stop": ["a"], "top_p": 0.5})
    assert got == RolloutConfig(prompts=3, samples=2, stop=("a",), top_p=0.5, engine=engine)
    assert with_options(RolloutConfig(), {"engine": {"window": 64}}).engine == engine


def test_errors_name_the_key_and_not_the_member_of_a_union():
    def refused(**options):
        with pytest.raises(UserError) as error:
            with_options(RolloutConfig(), options)
        return str(error.value)

    assert refused(control={"kind": "regex", "pattern": 3}) == "control.pattern: got 3, want text"
    assert (
        refused(control={"kind": "allow", "tokens": [1.5]}) == "control.tokens.0: got 1.5, want a whole number, or text"
    )
    assert refused(control={"kind": "stop", "texts": [3]}) == "control.texts.0: got 3, want text"
    assert refused(control=RolloutConfig()).startswith("control: got RolloutConfig(")


def test_every_wrong_option_is_named():
    with pytest.raises(UserError) as error:
        with_options(RolloutConfig(), {"sample": 4, "prompts": 0, "engine": {"window": "wide"}})
    lines = str(error.value).splitlines()
    assert lines[0].startswith("sample: got an unknown option, want one of: prompts, samples, ")
    assert lines[0].endswith('Perhaps you meant "samples"')
    with pytest.raises(UserError, match=r"decode_chunk: got an unknown option, .* It belongs into engine=\{...\}"):
        with_options(RolloutConfig(), {"decode_chunk": 4})
    with pytest.raises(UserError, match=r"^engine.decode_chunck: got an unknown option$"):
        with_options(RolloutConfig(), {"engine": {"decode_chunck": 4}})
    with pytest.raises(UserError, match=r"^prompts: got -8, want"):
        with_options(RolloutConfig(prompts=-8), {})
    assert lines[1].startswith("prompts: got 0, want") and lines[2].startswith("engine.window: got 'wide', want")
