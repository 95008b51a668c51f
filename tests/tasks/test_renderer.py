"""Chat templates are untrusted programs: they are stopped at limits of time, memory and output, with a message."""

import time

import pytest
from tokenizer_setup import CHATML, save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import renderer
from jaxrl_llm.tasks.config import PretrainedTokenizer
from jaxrl_llm.tasks.tokenizer import load_tokenizer

ENDLESS = {
    "loops": "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "one number": "{{ 10 ** (10 ** 10) }}",
}
TOO_MUCH = {
    "text": ("{{ 'x' * 20000000 }}", "writes more than 10,000,000 characters"),
    "memory": ("{{ ('x' * 3 * 10 ** 9) | length }}", "raises MemoryError"),
    "many texts": ("{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", "raises MemoryError"),
    "width": ("{{ 'x'.ljust(10 ** 11) }}", "raises MemoryError"),
    "recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "raises RecursionError"),
    "half a character": ('{{ "\\ud800" }}' + CHATML, "writes half of a character, want text"),
}


def error_of(directory, template) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(PretrainedTokenizer(str(save_tokenizer(directory, template=template))))
    return str(error.value)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_does_not_terminate(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(renderer, "SECONDS", 1)
    monkeypatch.setattr(renderer, "RENDERER", renderer.Renderer())
    monkeypatch.setattr("jaxrl_llm.tasks.chat.RENDERER", renderer.RENDERER)
    start = time.monotonic()
    assert error_of(tmp_path, ENDLESS[kind]) == (
        f"{tmp_path}: the chat template takes more than 1 s, or more memory than it may have"
    )
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_template_with_too_much_output_or_memory(tmp_path, kind):
    assert error_of(tmp_path, TOO_MUCH[kind][0]).startswith(f"{tmp_path}: the chat template {TOO_MUCH[kind][1]}")


def test_the_next_template_is_rendered_after_one_was_killed(tmp_path):
    error_of(tmp_path / "bad", TOO_MUCH["memory"][0])
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path / "good"))))
    assert tokenizer.decode(tokenizer.prompt("2+2")) == "user\n2+2\nassistant\n"
    # Several requests to the rendering process, in order.
    texts = [str(i) for i in range(2500)]
    assert [tokenizer.decode(ids).split("\n")[1] for ids in tokenizer.prompt_batch(texts)] == texts
