"""RunConfig: properties, and the tokenizer of another model."""

import yaml

from jaxrl_llm.config.loading import validate
from jaxrl_llm.config.run_config import RunConfig, tokenizer_for
from jaxrl_llm.tasks.config import PretrainedTokenizer
from jaxrl_llm.update.config import WarmStartConfig


def test_the_tokenizer_follows_the_model_that_is_evaluated():
    def tokenizer(text: str):
        return tokenizer_for(validate(yaml.safe_load(text), "test"), "other")

    assert (
        tokenizer("model: {path: m}")
        == tokenizer("model: {path: m}\ntokenizer: {path: m}")
        == PretrainedTokenizer("other")
    )
    assert tokenizer("model: {path: m}\ntokenizer: {path: t}") == PretrainedTokenizer("t")


def test_total_steps_are_those_of_warm_start_and_rl():
    assert RunConfig(steps=10, warm_start=WarmStartConfig(steps=5)).total_steps == 15
