"""What `generate.py` refuses before it launches anything, in words; and prompts as they stand."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_weights import SMALL, MadeWeights
from omegaconf import OmegaConf

import evaluation.inference
import generate
from cli.arguments import CONF, hydra_arguments
from cli.config import load_generate_config
from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from evaluation.config import GenerateJobConfig
from formats.conversion import convert
from formats.errors import FormatError
from training.config_validation import ConfigError

CONTEXT = 64
CPU = "parallel.accelerator=cpu"


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a byte tokenizer."""
    byte = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    folder = tmp_path_factory.mktemp("generation") / "hf"
    model = dataclasses.replace(SMALL, vocab_size=272, max_seq_len=CONTEXT)
    convert(MadeWeights(model), byte, folder, "hf")
    return folder


def composed(*arguments: str) -> Any:
    return compose("generate", hydra_arguments(list(arguments), "generate", texts=("prompt",)))


def load(*arguments: str) -> GenerateJobConfig:
    """As `python generate.py ARGUMENTS` reads it."""
    return load_generate_config(composed("checkpoint=here", *arguments))


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prompt="], "prompt ('') is empty"),
        (["prompt=x", "prompts=y.txt"], "prompts (y.txt) and prompt ('x') are both given"),
        (["max_new_tokens=0"], "max_new_tokens (0) is below 1: use at least 1"),
        (["batch_size=-2"], "batch_size (-2) is below 1"),
        (["top_k=0"], "top_k (0) is below 1: use at least 1, or null"),
        (["top_p=0"], "top_p (0.0) is not in (0, 1]"),
        (["top_p=1.1"], "top_p (1.1) is not in (0, 1]"),
        (["top_p=nan"], "top_p (nan) is not in (0, 1]"),
        (["temperature=-1"], "temperature (-1.0) is not a number from 0 on"),
        (["temperature=inf"], "temperature (inf) is not a number from 0 on"),
        (["temperature=hot"], "temperature ('hot') has the wrong type"),
        (["temprature=1"], "temprature is not a key: did you mean temperature?"),
        (["tokenizer_path=null"], "tokenizer_path (None) has the wrong type"),
        (["precision.fp8=rowwise"], "precision.fp8 (rowwise) is for training alone"),
    ],
)
def test_wrong_keys_are_told(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    assert [problem.startswith(told) for problem in error.value.errors] == [True]


def test_the_checkpoint_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="checkpoint has no value: add checkpoint="):
        load_generate_config(composed("prompt=x"))


@settings(deadline=None, max_examples=40)
@given(st.text("\\\"'${}[]()=,:#! \n\tan0é", min_size=1).filter(lambda text: text != "null"))
@example('He said: "${oc.env:HOME}, [it\'s] {so}" = \\')
@example("\\\n")
@example(" def ")
@example("12")
@example("true")
def test_a_prompt_is_what_the_shell_handed_over(text: str) -> None:
    """Also for processes that are started with the rewritten arguments, and rewrite them again."""
    arguments = hydra_arguments([f"prompt={text}"], "generate", texts=("prompt",))
    again = hydra_arguments(arguments, "generate", texts=("prompt",))
    values: Any = OmegaConf.to_container(compose("generate", again), resolve=True)
    assert values["prompt"] == text


# ---------------------------------------------------------------- weights, prompts, mesh


@pytest.fixture
def refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`refused("prompt=…", …)`: the problems that end the program before it launches anything."""

    def launch(*_: Any) -> None:
        pytest.fail("it was launched")

    monkeypatch.setattr(evaluation.inference, "load_model", launch)

    def problems(*arguments: str) -> list[str]:
        config = load_generate_config(composed(f"checkpoint={checkpoint}", CPU, *arguments))
        with pytest.raises((ConfigError, FormatError)) as error:
            generate.run(config)
        return getattr(error.value, "problems", [str(error.value)])

    return problems


def test_a_prompt_that_the_context_does_not_hold_is_refused(refused: Any) -> None:
    """The context holds the token that begins a text, and 63 bytes."""
    assert refused(f"prompt={'a' * CONTEXT}") == [
        "prompt has 65 tokens, 1 more than the model's context (max_seq_len) of 64: shorten it"
    ]
    with pytest.raises(pytest.fail.Exception, match="it was launched"):
        refused(f"prompt={'a' * (CONTEXT - 1)}")


def test_all_bad_lines_of_a_file_are_told_by_their_numbers(refused: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("good\n\n" + "a" * 100 + "\r\nalso good\n\n")
    assert refused(f"prompts={file}") == [
        f"prompts ({file}) line 2 is empty: give the beginning of a text",
        f"prompts ({file}) line 3 has 101 tokens, 37 more than the model's context (max_seq_len) "
        "of 64: shorten it",
        f"prompts ({file}) line 5 is empty: give the beginning of a text",
    ]
    file.write_text("x\n" + "\n" * 30)
    told = refused(f"prompts={file}")
    assert len(told) == 11 and told[-1] == f"and 20 more prompts of {file}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no prompt: write one a line"),
        (b"\n \n", "holds no prompt"),
        (b"caf\xe9\n", "cannot be read ('utf-8' codec can't decode"),
        (None, "cannot be read (No such file or directory): name a text file in UTF-8"),
    ],
)
def test_files_without_prompts_are_refused(
    refused: Any, tmp_path: Path, content: bytes | None, told: str
) -> None:
    for name in ("prompts.txt", "prompts.jsonl"):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        (problem,) = refused(f"prompts={file}")
        assert problem.startswith(f"prompts ({file}) {told}")


def test_lines_that_are_no_prompts_are_told(refused: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "good"}', '{"prompt": 3}', '{"text": "x"}', "def", '["x"]', ""]
    file.write_text("\n".join([*lines, json.dumps({"prompt": "good"})]))
    told = refused(f"prompts={file}")
    assert [problem.partition(" is not an object")[0] for problem in told] == [
        f"prompts ({file}) line {n}" for n in (2, 3, 4, 5, 6)
    ]
    file.write_text('{"prompt": "half a character: \\ud83d"}\n{"prompt": ""}\n')
    first, second = refused(f"prompts={file}")
    assert "line 1 is not a text: it holds half a character" in first
    assert "line 2 is empty" in second


def test_what_is_no_folder_of_weights_is_refused(refused: Any, tmp_path: Path) -> None:
    assert "holds no weights" in refused("prompt=x", f"checkpoint={tmp_path}")[0]
    assert "is no folder" in refused("prompt=x", f"checkpoint={tmp_path / 'x'}")[0]


def test_axes_without_a_use_are_refused(refused: Any) -> None:
    told = refused("prompt=x", "parallel.dp_shard=2", "parallel.cp=2", "parallel.devices=null")
    assert [problem.partition(" has no use")[0] for problem in told] == [
        "parallel.dp_shard (2)",
        "parallel.cp (2)",
    ]
    (told,) = refused("prompt=x", "parallel.tp=5")[:1]
    assert told.startswith("parallel.tp (5) does not divide model.n_heads (16)")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    refused: Any, checkpoint: Path, tmp_path: Path
) -> None:
    convert(MadeWeights(SMALL), None, tmp_path / "hf", "hf")  # of 144 tokens
    told = refused(f"checkpoint={tmp_path / 'hf'}", f"tokenizer_path={checkpoint}", "prompt=x")
    assert "tokenizer's 272 tokens are more than the model's vocab_size (144)" in told[0]
    assert "holds no tokenizer.model" in refused(f"checkpoint={tmp_path / 'hf'}", "prompt=x")[0]
