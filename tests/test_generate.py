"""`generate.py` as people use it: a file, a pipe, a terminal that is closed, Ctrl-C.

The weights are random ones, exported to a Hugging Face folder, from which `transformers` generates
what is expected. A token is a byte, so most texts are not UTF-8 and all ways must replace alike.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, start_program
from made_weights import SCALED, SMALL, MadeWeights
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from formats.conversion import convert

CONTEXT = 64
GREEDY = ["temperature=0", "max_new_tokens=20", "parallel.accelerator=cpu"]
PROMPTS = ["def main(", "x", "Grüße, 世界", "import os\nimport sys", "a" * (CONTEXT - 10)]
AS_IT_STANDS = 'He said: "${x}, [it\'s] {so}" = \\'


def exported(folder: Path, max_seq_len: int) -> Path:
    """Random weights with a byte tokenizer, as a Hugging Face folder."""
    tokenizer = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    assert tokenizer is not None
    model = dataclasses.replace(SMALL, vocab_size=272, rope_scaling=SCALED, max_seq_len=max_seq_len)
    convert(MadeWeights(model), tokenizer, folder, "hf")
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("short") / "hf", CONTEXT)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose texts take hours."""
    return exported(tmp_path_factory.mktemp("endless") / "hf", 2**18)


@pytest.fixture(scope="module")
def expected(short: Path) -> list[list[int]]:
    """What transformers makes of the prompts, each by itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(short)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        n_tokens = min(20, CONTEXT + 1 - ids.shape[1])
        told = model.generate(ids, max_new_tokens=n_tokens, do_sample=False)[0, ids.shape[1] :]
        found.append([token for token in told.tolist() if token != tokenizer.eos_token_id])
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
    return found


def text_of(tokens: list[int]) -> str:
    """By hand: bytes, then names."""
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    names += [f"<|reserved_special_token_{n}|>" for n in range(14)]
    parts = (bytes([t]) if t < 256 else names[t - 256].encode() for t in tokens)
    return b"".join(parts).decode(errors="replace")


def test_prompts_of_a_file_get_the_text_that_transformers_generates(
    short: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    done = start_program(
        ["generate.py", f"checkpoint={short}", f"prompts={file}", "batch_size=2", *GREEDY]
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [
        {"prompt": prompt, "text": text_of(tokens), "tokens": tokens}
        for prompt, tokens in zip(PROMPTS, expected, strict=True)
    ]
    lines = done.stderr.splitlines()
    n_prompt = sum(1 + len(prompt.encode()) for prompt in PROMPTS)
    assert lines[0].startswith(f"prompts: {n_prompt} tokens, ") and "tokens/s" in lines[0]
    n_new = sum(map(len, expected))
    assert lines[1].startswith(f"generated: {n_new} tokens, ") and "tokens/s" in lines[1]
    assert lines[2:] == ["1 of 5 texts ended with the model's context (max_seq_len) of 64 tokens"]


def test_lines_of_a_pipe_are_completed_on_two_processes(
    short: Path, expected: list[list[int]]
) -> None:
    """The one line that cannot be is told once, and the next ones are completed all the same."""
    lines = [*PROMPTS[:2], "", "a" * CONTEXT, PROMPTS[2]]
    done = subprocess.run(
        [
            *(sys.executable, "generate.py", f"checkpoint={short}", "parallel.tp=2"),
            *(*GREEDY, "max_new_tokens=8"),
        ],
        input="\n".join(lines),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(text_of(tokens[:8]) + "\n" for tokens in expected[:3])
    assert done.stderr.count("The prompt has 65 tokens, 1 more than the model's context") == 1


@contextmanager
def speaking(checkpoint: Path, *overrides: str) -> Iterator[tuple[Any, bytes]]:
    """The program in the middle of a text that takes hours, and what it has said by then."""
    process = subprocess.Popen(
        [
            *(sys.executable, "generate.py", f"checkpoint={checkpoint}", "max_new_tokens=200000"),
            *(f"prompt={AS_IT_STANDS}", "parallel.accelerator=cpu", *overrides),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        said = first = os.read(process.stdout.fileno(), 2**16)
        while len(said) < len(AS_IT_STANDS) + 20:
            said += os.read(process.stdout.fileno(), 2**16)
        assert len(first) < 1000, "the text came in blocks, not token by token"
        yield process, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_in_the_middle_of_a_text_ends_all_processes_in_peace(endless: Path) -> None:
    with speaking(endless, "parallel.tp=2") as (process, said):
        assert said.startswith(AS_IT_STANDS.encode())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        told = process.stderr.read()  # which ends when no process has it open any more
        assert told == b"", told.decode()


def test_a_reader_who_leaves_is_no_error(endless: Path) -> None:
    with speaking(endless) as (process, said):
        assert said.startswith(AS_IT_STANDS.encode())
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""
        process.stdout = None
