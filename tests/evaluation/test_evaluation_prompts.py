"""`generate.py` before launch: configuration errors, and prompts passed through unchanged."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from random_weights import SMALL, RandomWeights

import evaluation.inference
import generate
from cli.arguments import CONF, hydra_arguments
from cli.config import load_generate_config
from data.config import TokenizerConfig
from data.tokenizer import BYTE_RANKS, Tokenizer, ready_tokenizer
from evaluation.config import GenerateJobConfig
from evaluation.prompts import Prompt, PromptEncoder, read_prompts
from formats.conversion import convert
from formats.detection import open_weights
from formats.errors import FormatError
from formats.instruct import find_chat_template
from formats.tokenizers import find_tokenizer
from training.config_validation import ConfigError

CONTEXT = 64
CPU = "parallel.accelerator=cpu"


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a byte tokenizer."""
    byte = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    folder = tmp_path_factory.mktemp("generation") / "hf"
    model = dataclasses.replace(SMALL, vocab_size=272, max_seq_len=CONTEXT)
    convert(RandomWeights(model), byte, folder, "hf")
    return folder


def composed(*arguments: str) -> Any:
    return compose("generate", hydra_arguments(list(arguments), "generate"))


def load(*arguments: str) -> GenerateJobConfig:
    """Load the configuration like `python generate.py ARGUMENTS`."""
    return load_generate_config(composed("checkpoint=here", *arguments))


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat=true", "prompt="], "prompt='' is empty, but chat=true needs a message"),
        (["prompt=x", "system=y"], "system='y' has no effect without chat=true; add chat=true"),
        (["stop=['']"], "stop[0]='' is empty"),
        (["stop=null"], "stop=null is not a list; use stop=[], or a list of values"),
        (["stop="], "stop='' is not a list; use stop=[], or a list of values"),
        (["stop=Q:"], "stop='Q:' is not a list; use 'stop=[\"Q:\"]'"),
        (
            ["chat=true", "tokenizer_path=null", "prompts=x.jsonl"],
            "tokenizer_path=null cannot encode the messages of chat=true",
        ),
        (["repetition_penalty=0"], "repetition_penalty=0 is below 0.01"),
        (["prompt=x", "prompts=y.txt"], "prompts=y.txt and prompt='x' are both given"),
        (["max_new_tokens=0"], "max_new_tokens=0 is below 1; use at least 1"),
        (["batch_size=-2"], "batch_size=-2 is below 1"),
        (["top_k=0"], "top_k=0 is below 1; use at least 1 or null"),
        (["top_p=0"], "top_p=0 is not above 0"),
        (["top_p=1.1"], "top_p=1.1 is above 1"),
        (["top_p=nan"], "top_p=nan is above 1"),
        (["temperature=-1"], "temperature=-1 is below 0"),
        (["temperature=inf"], "temperature=inf is not finite"),
        (["temperature=hot"], "temperature='hot' has the wrong type"),
        (
            ["checkpoint=https://huggingface.co/org/Llama/tree/main"],
            "checkpoint=https://huggingface.co/org/Llama/tree/main is a URL, but only paths of "
            "mounted file systems are supported; hf download org/Llama --local-dir Llama, then use "
            "checkpoint=Llama",
        ),
        (["temp=0"], "Unknown key temp. Did you mean temperature?"),
        (["temprature=1"], "Unknown key temprature. Did you mean temperature?"),
        (
            ["prompt=x", "tokenizer_path=null"],
            "tokenizer_path=null cannot encode text",
        ),
        (["precision.fp8=rowwise"], "precision.fp8=rowwise is for training only"),
    ],
)
def test_invalid_values_are_rejected(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    assert [each.startswith(message) for each in error.value.errors] == [True]


def test_checkpoint_is_required() -> None:
    with pytest.raises(ConfigError, match="checkpoint has no value; add checkpoint="):
        load_generate_config(composed("prompt=x"))


@settings(deadline=None, max_examples=40)
@given(st.text("\\\"'${}[]()=,:#! \n\tan0é", min_size=1).filter(lambda text: text != "null"))
@example('He said: "${oc.env:HOME}, [it\'s] {so}" = \\')
@example("\\\n")
@example(" def ")
@example("12")
@example("true")
def test_prompt_is_passed_through_unchanged(text: str) -> None:
    arguments = hydra_arguments([f"prompt={text}"], "generate")
    values: Any = OmegaConf.to_container(compose("generate", arguments), resolve=True)
    assert values["prompt"] == text


# ---------------------------------------------------------------- weights, prompts, mesh


@pytest.fixture
def errors_of(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that returns the errors raised before launch: `errors_of("prompt=…", …)`."""

    def launch(*_: Any) -> None:
        pytest.fail("launched")

    monkeypatch.setattr(evaluation.inference, "load_model", launch)

    def errors(*arguments: str) -> list[str]:
        composed_config = composed(f"checkpoint={checkpoint}", CPU, *arguments)
        with pytest.raises((ConfigError, FormatError)) as error:
            generate.run(load_generate_config(composed_config))
        return getattr(error.value, "errors", [str(error.value)])

    return errors


def test_prompt_longer_than_the_context_is_rejected(errors_of: Any) -> None:
    """The context of 64 tokens fits the begin-of-text token and 63 bytes."""
    assert errors_of(f"prompt={'a' * CONTEXT}") == [
        "prompt has 65 tokens, 1 more than the model's context length (max_seq_len=64); shorten it"
    ]
    with pytest.raises(pytest.fail.Exception, match="launched"):
        errors_of(f"prompt={'a' * (CONTEXT - 1)}")


def test_all_invalid_lines_of_a_file_are_reported_with_line_numbers(
    errors_of: Any, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("good\n\n" + "a" * 100 + "\r\nalso good\n\n")
    assert errors_of(f"prompts={file}") == [
        f"prompts={file} line 3 has 101 tokens, 37 more than the model's context length "
        "(max_seq_len=64); shorten it",
    ]  # empty lines are no prompts
    file.write_text(("a" * 100 + "\n") * 30 + "x\n")
    errors = errors_of(f"prompts={file}")
    assert len(errors) == 11 and errors[-1] == f"and 20 more prompts of {file}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no prompts; write one prompt per line"),
        (b"\n \n", "contains no prompts"),
        (b"caf\xe9\n", "cannot be read ('utf-8' codec can't decode"),
        (None, "cannot be read (No such file or directory); use a text file in UTF-8"),
    ],
)
def test_file_without_prompts_is_rejected(
    errors_of: Any, tmp_path: Path, content: bytes | None, message: str
) -> None:
    for name in ("prompts.txt", "prompts.jsonl"):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        (error,) = errors_of(f"prompts={file}")
        assert error.startswith(f"prompts={file} {message}")


def test_invalid_json_lines_are_rejected(errors_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "good"}', '{"prompt": 3}', '{"text": "x"}', "def", '["x"]', ""]
    file.write_text("\n".join([*lines, json.dumps({"prompt": "good"})]))
    errors = errors_of(f"prompts={file}")
    assert [error.partition(" is not an object")[0] for error in errors] == [
        f"prompts={file} line {n}" for n in (2, 3, 4, 5)
    ]
    ids = [[], [1, -1], [272], [1.0], [True]]
    records = [{"prompt": "\ud83d"}, *({"prompt": each} for each in ids)]
    records += [{"prompt": "x", "messages": []}, {"messages": []}, {"messages": ["x"]}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    errors = errors_of(f"prompts={file}")
    assert "line 1 is not valid text: it contains an unpaired surrogate" in errors[0]
    assert "line 2 has no token ids; use at least one" in errors[1]
    for error, token in zip(errors[2:6], ("-1", "272", "1.0", "True"), strict=True):
        assert f"has the token id {token}; use whole numbers from 0 to 271" in error
    assert all("is not an object with either" in error for error in errors[6:9])


def test_prompts_whose_output_would_not_be_json_are_rejected(
    errors_of: Any, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x", "id": NaN}\n{"prompt": "x", "id": "\\ud800"}\n')
    not_json, not_text = errors_of(f"prompts={file}")
    assert "line 1 is not an object" in not_json and "line 2 is not valid text" in not_text
    file = tmp_path / "prompts.json"
    file.write_text('[{"prompt": "x"}]')
    (error,) = errors_of(f"prompts={file}")
    assert "is not a list of lines; write one object per line to a .jsonl file" in error


def test_messages_without_text_are_rejected_and_text_parts_joined(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}|{% endgeneration %}{% endfor %}"
    )
    model = open_weights(checkpoint).model
    tokenizer = find_tokenizer(checkpoint)
    encoder = PromptEncoder(model, tokenizer, [tmp_path])
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]
    prompt = encoder.encode([{"role": "user", "content": parts}])
    assert bytes(prompt.ids) == b"Hi!|"
    for messages, message in (
        ([{"role": "user"}], "each needs a role and a text as content"),
        ([{"role": "user", "content": None}], "each needs a role and a text as content"),
        ([{"role": "user", "content": "Hi"}, 3], "each needs a role and a text as content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content of type image; use text"),
        ([{"role": "assistant", "content": ""}], "ends with an empty message of the assistant"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(messages)
    with pytest.raises(ValueError, match="is plain text, on which system has no effect"):
        PromptEncoder(model, tokenizer, system="Be brief.").encode("x")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"cannot be read .* save it as text in UTF-8"):
        PromptEncoder(model, tokenizer, [tmp_path], chat=True).encode("x")


def test_folder_without_weights_is_rejected(errors_of: Any, tmp_path: Path) -> None:
    assert "contains no weights" in errors_of("prompt=x", f"checkpoint={tmp_path}")[0]
    assert "is not a folder" in errors_of("prompt=x", f"checkpoint={tmp_path / 'x'}")[0]


def test_unsupported_mesh_axes_are_rejected(errors_of: Any) -> None:
    errors = errors_of("prompt=x", "parallel.dp_shard=2", "parallel.cp=2", "parallel.devices=null")
    assert [error.partition(" is not supported")[0] for error in errors] == [
        "parallel.dp_shard=2",
        "parallel.cp=2",
    ]
    (error,) = errors_of("prompt=x", "parallel.tp=5")[:1]
    assert error.startswith("parallel.tp=5 does not divide model.n_heads=16")


def test_tokenizer_larger_than_the_model_vocabulary_is_rejected(
    errors_of: Any, checkpoint: Path, tmp_path: Path
) -> None:
    convert(RandomWeights(SMALL), None, tmp_path / "hf", "hf")  # vocab_size=144
    (error,) = errors_of(
        f"checkpoint={tmp_path / 'hf'}", f"tokenizer_path={checkpoint}", "prompt=x"
    )
    assert "the tokenizer has 272 tokens, more than vocab_size=144 of the model" in error
    assert (
        "contains neither tokenizer.model"
        in errors_of(f"checkpoint={tmp_path / 'hf'}", "prompt=x")[0]
    )


# ---------------------------------------------------------------- kinds of prompts


def encoder(checkpoint: Path, **options: Any) -> PromptEncoder:
    weights = open_weights(checkpoint)
    return PromptEncoder(weights.model, find_tokenizer(checkpoint), [checkpoint], **options)


def test_prompt_may_be_empty_or_token_ids(checkpoint: Path, tmp_path: Path) -> None:
    byte = encoder(checkpoint)
    assert byte.encode("").ids == [256]  # begin-of-text alone
    assert byte.encode([256, 65, 257]) == Prompt(
        "<|begin_of_text|>A<|end_of_text|>", [256, 65, 257], {"prompt": [256, 65, 257]}
    )
    without = PromptEncoder(byte.model, None)
    assert without.encode([3, 4]).ids == [3, 4]
    with pytest.raises(ValueError, match="is text, but tokenizer_path=null; use token ids"):
        without.encode("text")
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "", "id": 7}\n{"id": null, "prompt": [1]}\n{"prompt": "a"}\n')
    prompts, errors = read_prompts(None, str(file), byte)
    assert not errors
    assert [prompt.record for prompt in prompts] == [
        {"id": 7, "prompt": ""},
        {"id": None, "prompt": [1]},
        {"prompt": "a"},
    ]


def test_messages_are_encoded_with_the_special_tokens_of_the_template(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "instruct"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}\n"
        "    {{- m.role[0] }}:{{ m.content }}{{ eos_token -}}\n"
        "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    chat = encoder(folder, chat=True, system="S")
    expected = [256, *b"s:S", 257, *b"u:hi", 257, *b"a:"]
    assert chat.encode("hi").ids == expected
    assert encoder(folder).encode([{"role": "user", "content": "hi"}]).ids == [
        *(256, *b"u:hi", 257, *b"a:")
    ]
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well "}]
    # The assistant's last message is continued.
    assert chat.encode(conversation).ids == [*expected, *b"Well "]
    with pytest.raises(
        ValueError, match=r"has the message \{\}; each needs a role and a text as content"
    ):
        chat.encode([{}])
    for text in (
        "{{ raise_exception('no system') }}",
        "{{ messages[0].__class__.mro() }}",
        "{% if",
    ):
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises(ValueError, match=r"chat_template.jinja cannot render the messages \("):
            encoder(folder, chat=True).encode("hi")


def test_chat_without_a_template_is_rejected(errors_of: Any) -> None:
    (error,) = errors_of("prompt=hi", "chat=true")
    assert "has no chat template, and its tokenizer lacks Llama 3's special tokens; put" in error


@pytest.mark.parametrize(
    ("stored", "result"),
    [
        ([{"name": "rag", "template": "x"}, {"name": "default", "template": "T"}], "T"),
        ({"default": "T"}, "T"),
        ([{"name": "rag", "template": "x"}], "has the chat templates rag, but none is named"),
        (["T"], "but none is named default"),
        (5, "chat_template is not a text; put the template to use in chat_template.jinja"),
    ],
)
def test_stored_templates_are_read_by_name(stored: Any, result: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    tokenizer = Tokenizer("byte", BYTE_RANKS)
    if result == "T":
        assert find_chat_template([tmp_path], tokenizer).text == "T"
        return
    with pytest.raises(FormatError, match=result):
        find_chat_template([tmp_path], tokenizer)


def test_template_without_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("")
    model = dataclasses.replace(SMALL, vocab_size=272)
    encoder = PromptEncoder(model, Tokenizer("byte", BYTE_RANKS), [tmp_path], chat=True)
    with pytest.raises(
        ValueError, match=r"is empty in the chat template of .*chat_template\.jinja"
    ):
        encoder.encode("Hi")
