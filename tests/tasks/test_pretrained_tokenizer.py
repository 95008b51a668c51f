"""Hugging Face tokenizers: the same tokens as transformers, all end tokens, one clear message per mistake."""

import json

import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_setup import BOS, CHATML, ENDOFTEXT, IM_END, IM_START, SPECIAL, save_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerFast

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import PretrainedTokenizer
from jaxrl_llm.tasks.tokenizer import load_tokenizer

TEXTS = [
    "What is 3 + 4?",
    "",
    " two  spaces ",
    "é∑😀\n\t",
    "<think>no</think>",
    "<|im_end|>",
    "{{ braces }} {% raw %}",
    "a\r\nb",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """ChatML, <|im_end|> ends, <|endoftext|> pads."""
    return save_tokenizer(tmp_path_factory.mktemp("plain"), generation={"eos_token_id": [IM_END, ENDOFTEXT]})


def load(directory, **fields):
    return load_tokenizer(PretrainedTokenizer(str(directory), **fields))


def error_of(directory, **fields) -> str:
    with pytest.raises(UserError) as error:
        load(directory, **fields)
    return str(error.value)


@pytest.mark.parametrize("system", ["", "You are a calculator."])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_prompts_match_transformers(plain, system, arguments):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(plain)
    ours = load(plain, system=system, template=arguments, special_in_data="keep")
    start = [{"role": "system", "content": system}] if system else []
    expected = [
        theirs.apply_chat_template(
            [*start, {"role": "user", "content": text}],
            tokenize=True, add_generation_prompt=True, return_dict=False, **arguments,
        )
        for text in TEXTS
    ]  # fmt: skip
    assert ours.prompt_batch(TEXTS) == expected
    split = load(plain, system=system, template=arguments).prompt_batch(TEXTS)
    assert [text for text, a, b in zip(TEXTS, split, expected, strict=True) if a != b] == ["<|im_end|>"]
    assert [ours.prompt(text) for text in TEXTS] == expected


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_prompt_matches_transformers(chatting, text):
    ours, theirs = chatting
    turns = [{"role": "user", "content": text}]
    assert ours.prompt(text) == theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def chatting(plain):
    from transformers import AutoTokenizer

    return load(plain), AutoTokenizer.from_pretrained(plain)


def test_a_prompt_by_hand(plain):
    tokenizer = load(plain, system="Be brief.", template={"enable_thinking": False})
    assert tokenizer.backend.decode(tokenizer.prompt("2+2"), skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    short = load(plain).prompt("2+2")
    assert [t for t in short if t in (IM_START, IM_END)] == [IM_START, IM_END, IM_START]


@pytest.fixture(scope="module")
def loaded(plain):
    return load(plain, chat=False)


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda t: not any(s in t for s in SPECIAL))
)
def test_every_text_round_trips(loaded, text):
    """The vocabulary has all bytes, so nothing is unknown; only names of special tokens are lost."""
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.unknown_characters(text) == []


def test_special_tokens_are_left_out_and_tags_stay(loaded):
    think, end_think = loaded.encode("<think></think>")
    ids = [IM_START, think, *loaded.encode(" 3 + 4 "), end_think, *loaded.encode("7"), IM_END, ENDOFTEXT]
    assert loaded.decode(ids) == "<think> 3 + 4 </think>7"
    assert loaded.decode_batch([ids, [IM_END], []]) == ["<think> 3 + 4 </think>7", "", ""]
    # No cleaning up: transformers would take the space before the point away if tokenizer_config.json asked for it.
    assert loaded.decode(loaded.encode("a . b , c n't")) == "a . b , c n't"


def test_tokens_have_display_names(loaded):
    assert [loaded.token(i) for i in (IM_END, *loaded.encode("\n a"), *loaded.encode("<think>"))] == [
        "<|im_end|>", "\n", " a", "<think>",
    ]  # fmt: skip
    # é is two bytes and here two tokens: neither is a character, so their names are shown.
    assert [loaded.token(i) for i in loaded.encode("é")] == ["Ã", "©"]
    assert loaded.token(10**6) == "<1000000>"


def test_the_size_counts_added_tokens(loaded):
    assert loaded.size == max(loaded.encode("<think></think>")) + 1 == 302


@pytest.mark.parametrize(
    "generation, stop, expected",
    [
        (None, (), (IM_END,)),
        ({}, (), (IM_END,)),
        ({"eos_token_id": None}, (), (IM_END,)),
        ({"eos_token_id": ENDOFTEXT}, (), (IM_END, ENDOFTEXT)),
        ({"eos_token_id": [ENDOFTEXT, IM_END, IM_START]}, (), (IM_END, ENDOFTEXT, IM_START)),
        ({"eos_token_id": [ENDOFTEXT]}, ("</think>", "<|im_end|>"), (IM_END, ENDOFTEXT, 301)),
    ],
)
def test_end_tokens_are_the_tokenizers_the_generation_configs_and_stop(tmp_path, generation, stop, expected):
    tokenizer = load(save_tokenizer(tmp_path, generation=generation), stop=stop)
    assert tokenizer.eos == expected and tokenizer.pad == ENDOFTEXT


def test_without_padding_the_first_end_token_pads(tmp_path):
    tokenizer = load(save_tokenizer(tmp_path, pad=None, eos=None, generation={"eos_token_id": [IM_END, ENDOFTEXT]}))
    assert (tokenizer.pad, tokenizer.eos) == (IM_END, (IM_END, ENDOFTEXT))


def test_a_plain_prompt_has_bos_and_no_end_token(tmp_path):
    tokenizer = load(save_tokenizer(tmp_path, around="<s> $A <|endoftext|>"), chat=False)
    assert tokenizer.prompt("3") == [BOS, *tokenizer.encode("3")]
    assert tokenizer.prompt("") == [BOS]
    assert BOS not in tokenizer.encode("3") and ENDOFTEXT not in tokenizer.prompt("3")


def test_a_template_with_bos_gives_one_bos(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, template="{{ bos_token }}" + CHATML, around="<s> $A")
    prompt = load(tmp_path).prompt("3")
    assert prompt[0] == BOS and prompt.count(BOS) == 1
    turns = [{"role": "user", "content": "3"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert prompt == theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_padding_and_truncation_settings_are_ignored(tmp_path):
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    path.write_text(json.dumps(values))
    tokenizer = load(tmp_path, chat=False)
    text = "What is 3 + 4? What is 3 + 4?"
    assert tokenizer.decode(tokenizer.prompt(text)) == text and ENDOFTEXT not in tokenizer.prompt("3")


def test_a_saved_tokenizer_loads_equal(plain, tmp_path):
    first = load(plain, system="Be brief.")
    first.save(tmp_path / "out")
    again = load(tmp_path / "out", system="Be brief.")
    assert again.prompt_batch(TEXTS) == first.prompt_batch(TEXTS)
    assert (again.size, again.pad) == (first.size, first.pad)


# Each of the rest is one mistake and the message it deserves.


def test_a_path_that_is_no_directory(tmp_path, monkeypatch):
    assert error_of(tmp_path / "nowhere") == (
        f"tokenizer.path: got '{tmp_path}/nowhere', which is no directory, want one with tokenizer.json in it"
    )
    assert error_of("").startswith("tokenizer.path: got '', which is no directory")

    def offline(*args, **kwargs):
        raise OSError("no route to the hub\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert error_of("someone/model") == (
        "tokenizer.path: got 'someone/model', which is no directory here, and downloading it from the hub failed "
        "(no route to the hub); pass a local path"
    )


def test_a_hub_repository_is_read_from_its_snapshot(plain, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(plain))
    assert load("someone/model").eos == (IM_END, ENDOFTEXT)


def test_a_directory_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert error_of(tmp_path).startswith(f"tokenizer.path: {tmp_path} holds no tokenizer, want one of tokenizer.json, ")


def test_a_broken_tokenizer_file(tmp_path):
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    assert error_of(tmp_path).startswith(f"{tmp_path}: the tokenizer cannot be read: ")
    assert len(error_of(tmp_path).splitlines()) == 1


def test_wrong_types_in_a_tokenizers_files(tmp_path):
    """One line, whatever the underlying libraries raise; one of them panics."""
    save_tokenizer(tmp_path)
    files = {name: json.loads((tmp_path / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    model = files["tokenizer.json"]["model"]
    wrong = [
        ("tokenizer.json", {"model": {**model, "continuing_subword_prefix": "\x1b[31m"}}),
        ("tokenizer.json", {"model": {**model, "vocab": [1]}}),
        ("tokenizer.json", {"added_tokens": [{"id": "x", "content": 3}]}),
        ("tokenizer.json", {"added_tokens": 10**30}),
        ("tokenizer.json", {"normalizer": {"type": "Sequence", "normalizers": 3}}),
        ("tokenizer_config.json", {"eos_token": {"content": 3}}),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 3}}),
    ]
    for name, change in wrong:
        (tmp_path / name).write_text(json.dumps({**files[name], **change}))
        line = error_of(tmp_path)
        assert line.startswith(f"{tmp_path}: ") and "\n" not in line and len(line) < 700, change
        (tmp_path / name).write_text(json.dumps(files[name]))
    for text in ("[" * 100_000, '{"eos_token_id": ' + "9" * 5000 + "}", "\x00"):
        (tmp_path / "generation_config.json").write_text(text)
        assert error_of(tmp_path).startswith(f"{tmp_path}/generation_config.json: cannot be read: ")


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    save_tokenizer(tmp_path)
    path, mark = tmp_path / "tokenizer_config.json", tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n")
    values = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    path.write_text(json.dumps(values))
    try:
        load(tmp_path)
    except UserError:
        pass
    assert not mark.exists()


def test_no_end_token(tmp_path):
    assert error_of(save_tokenizer(tmp_path, eos=None)).startswith(f"{tmp_path}: got no end token, want eos_token in ")


@pytest.mark.parametrize("eos, shown", [(302, "302"), ([2, -1], "-1"), ("2", "'2'"), (True, "True"), ([None], "None")])
def test_an_invalid_end_token(tmp_path, eos, shown):
    save_tokenizer(tmp_path, generation={"eos_token_id": eos})
    assert error_of(tmp_path) == (
        f"{tmp_path}/generation_config.json: eos_token_id: got {shown}, want tokens below the tokenizer's 302"
    )


def test_a_broken_generation_config(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    assert error_of(tmp_path).startswith(f"{tmp_path}/generation_config.json: cannot be read: Expecting")


def test_a_stop_text_must_be_one_token(plain):
    assert error_of(plain, stop=("7", "STOP", "")).splitlines() == [
        "tokenizer.stop: got 'STOP', which is 4 tokens ['S', 'T', 'O', 'P'], want one",
        "tokenizer.stop: got '', which is 0 tokens [], want one",
    ]


def test_no_chat_template(tmp_path):
    save_tokenizer(tmp_path, template=None)
    assert "got no chat template" in error_of(tmp_path) and "tokenizer.chat: false" in error_of(tmp_path)
    assert load(tmp_path, chat=False).prompt("7") == load(tmp_path, chat=False).encode("7")


def test_a_template_that_raises(tmp_path):
    """Like Gemma's on a system turn."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    save_tokenizer(tmp_path, template=refuses + CHATML)
    assert error_of(tmp_path, system="Be brief.") == (
        f"{tmp_path}: the chat template raises TemplateError: System role not supported"
    )
    assert load(tmp_path).prompt("3")


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages[7].content.lower() }}", "{{ 1 / 0 }}"])
def test_a_template_that_is_broken(tmp_path, template):
    save_tokenizer(tmp_path, template=template)
    assert error_of(tmp_path).startswith(f"{tmp_path}: the chat template raises ")
    assert len(error_of(tmp_path).splitlines()) == 1


def test_a_template_that_leaves_the_system_prompt_out(tmp_path):
    save_tokenizer(tmp_path, template="{{ messages[-1].content }}:")
    assert "tokenizer.system: the chat template leaves the system prompt out" in error_of(tmp_path, system="Be brief.")
    # A word that the template writes anyway is no sign of a place for it.
    save_tokenizer(tmp_path, template="user: {{ messages[-1].content }}")
    assert "tokenizer.system: the chat template leaves the system prompt out" in error_of(tmp_path, system="use")


CONTENT, PARTS = "{{ message.content }}", "{% for part in message.content %}{{ part.text }}{% endfor %}"


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize(
    "content",
    [
        PARTS,
        "{{ message.content[0]['text'] }}",
        "{% for part in message.content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}",
        "{% if message.role == 'system' %}" + CONTENT + "{% else %}" + PARTS + "{% endif %}",
        "{% if message.role == 'system' %}" + PARTS + "{% else %}" + CONTENT + "{% endif %}",
    ],
)
def test_content_is_passed_in_parts_if_the_template_needs_it(tmp_path, content, system):
    """A loop over the parts of a string finds none: every prompt would lack its question."""
    parts = load(save_tokenizer(tmp_path / "parts", template=CHATML.replace(CONTENT, content)), system=system)
    assert parts.prompt_batch(TEXTS) == load(save_tokenizer(tmp_path / "text"), system=system).prompt_batch(TEXTS)


@pytest.mark.parametrize(
    "template", [CHATML.replace(CONTENT, ""), CHATML.replace(CONTENT, "{{ message.text }}"), "Hello."]
)
def test_a_template_that_leaves_the_prompt_out(tmp_path, template):
    assert error_of(save_tokenizer(tmp_path, template=template)) == (
        f"{tmp_path}: the chat template leaves the prompt out, as text and as a list of parts: want one that writes the user's turn"
    )


NO_BEGINNING = CHATML.split("{%- if add_generation_prompt %}")[0]
# Mistral's form: an answer stands right behind the prompt, and the end token behind it.
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_without_generation_prompt(tmp_path, caplog):
    """Refused if answers have a prefix that prompts would lack; a warning if that is unknown."""
    assert error_of(save_tokenizer(tmp_path, template=NO_BEGINNING)) == (
        f"{tmp_path}: the chat template writes no generation prompt (add_generation_prompt changes nothing), though "
        "'<|im_start|>assistant' stands before an answer: every prompt would lack it; want it rendered where "
        "add_generation_prompt is true, or tokenizer.chat: false for plain prompts"
    )
    tokenizer = load(save_tokenizer(tmp_path, template=INST))
    assert tokenizer.decode(tokenizer.prompt("2+2")) == "[INST] 2+2 [/INST]" and not caplog.messages
    only = "{% if not add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    assert load(save_tokenizer(tmp_path, template=only + CHATML)).prompt("7") and not caplog.messages
    load(save_tokenizer(tmp_path, template="{{ messages[0].content }}="))
    assert caplog.messages == [
        f"{tmp_path}: the chat template writes no generation prompt (add_generation_prompt changes nothing): prompts may lack the "
        "beginning of the assistant's turn"
    ]


def test_a_template_whose_turns_end_with_no_end_token(tmp_path, caplog):
    """ChatML with a base model's end token."""
    save_tokenizer(tmp_path, eos="<|endoftext|>")
    load(tmp_path)
    assert caplog.messages == [
        f"{tmp_path}: the chat template ends the assistant's turn with '<|im_end|>', which ends no response here: want it in "
        "tokenizer.stop"
    ]
    caplog.clear()
    load(tmp_path, stop=("<|im_end|>",))
    load(save_tokenizer(tmp_path, eos="<|endoftext|>", generation={"eos_token_id": [ENDOFTEXT, IM_END]}))
    assert caplog.messages == []
    load(save_tokenizer(tmp_path, template=INST.replace("{{ eos_token }}", "[END]")))
    assert [text.split("turn with ")[1] for text in caplog.messages] == [
        "'[END]', which ends no response here: want it in rollout.stop"
    ]


DATE = (
    "{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}\n"
)


def test_a_template_that_writes_todays_date(tmp_path, caplog):
    """Like Llama 3's: a warning, but none if the date is passed."""
    save_tokenizer(tmp_path, template=DATE + CHATML)
    load(tmp_path, template={"date_string": "26 Jul 2024"})
    assert caplog.messages == []
    load(tmp_path)
    (error_of,) = caplog.messages
    assert error_of.startswith(
        f"{tmp_path}: the chat template writes today's date: a run that is resumed on another day reads other"
    )
    assert "tokenizer.template" in error_of and "date_string" in error_of


def test_chat_settings_without_a_chat(plain):
    assert error_of(plain, chat=False, system="Be brief.", template={"enable_thinking": False}).splitlines() == [
        "tokenizer.system: got 'Be brief.', want it empty: tokenizer.chat is false",
        "tokenizer.template: got {'enable_thinking': False}, want it empty: tokenizer.chat is false",
    ]


def test_a_stop_text_that_is_the_unknown_token(tmp_path):
    """An unknown word is one token: all unknown words would end a response."""
    backend = Backend(models.WordLevel({"[UNK]": 0, "stop": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    fast.save_pretrained(tmp_path)
    assert load(tmp_path, chat=False, stop=("stop",)).eos == (2, 1)
    assert error_of(tmp_path, chat=False, stop=("halt", "STOP")).splitlines() == [
        "tokenizer.stop: got 'halt', which is the token '[UNK]', want text that it spells",
        "tokenizer.stop: got 'STOP', which is the token 'stop', want text that it spells",
    ]


def test_an_argument_that_the_template_does_not_know(plain):
    assert error_of(plain, template={"enable_thinkng": False, "tokenize": True}).splitlines() == [
        "tokenizer.template.enable_thinkng: the chat template has no such argument, perhaps you meant enable_thinking",
        "tokenizer.template.tokenize: the chat template has no such argument",
    ]
