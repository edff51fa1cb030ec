"""`generate.py` with a prompt file, a pipe, a closed stdout and Ctrl-C.

The weights are random and exported to a Hugging Face folder; transformers generates the expected
texts. Tokens are bytes, so most texts are invalid UTF-8, and both must replace the same bytes.
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
from processes import DEADLINE
from random_weights import SCALED, SMALL, RandomWeights
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from formats.conversion import convert

CONTEXT = 64
GREEDY = ["temperature=0", "max_new_tokens=20", "parallel.accelerator=cpu"]
PROMPTS = ["def main(", "x", "Grüße, 世界", "import os\nimport sys", "a" * (CONTEXT - 10)]
SPECIAL_CHARACTERS = 'He said: "${x}, [it\'s] {so}" = \\'


def exported(folder: Path, max_seq_len: int) -> Path:
    """Export random weights with a byte tokenizer to a Hugging Face folder."""
    tokenizer = ready_tokenizer(TokenizerConfig(name="byte", vocab_size=272))
    assert tokenizer is not None
    model = dataclasses.replace(SMALL, vocab_size=272, rope_scaling=SCALED, max_seq_len=max_seq_len)
    convert(RandomWeights(model), tokenizer, folder, "hf")
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("short") / "hf", CONTEXT)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a context so long that a text takes hours."""
    return exported(tmp_path_factory.mktemp("endless") / "hf", 2**18)


@pytest.fixture(scope="module")
def expected(short: Path) -> list[list[int]]:
    """Greedy completions by transformers, one prompt at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(short)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        n_tokens = min(20, CONTEXT + 1 - ids.shape[1])
        tokens = model.generate(ids, max_new_tokens=n_tokens, do_sample=False)[0, ids.shape[1] :]
        found.append([token for token in tokens.tolist() if token != tokenizer.eos_token_id])
    assert len({tuple(tokens) for tokens in found}) == len(PROMPTS)
    return found


def text_of(tokens: list[int]) -> str:
    """Reference detokenization: bytes, and names of special tokens."""
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    names += [f"<|reserved_special_token_{n}|>" for n in range(14)]
    parts = (bytes([t]) if t < 256 else names[t - 256].encode() for t in tokens)
    return b"".join(parts).decode(errors="replace")


def test_completions_of_a_prompt_file_equal_transformers(
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
    assert lines[2:] == ["1 of 5 completions reached the model's context length (max_seq_len=64)"]


def test_lines_of_a_pipe_are_completed_by_two_processes(
    short: Path, expected: list[list[int]]
) -> None:
    """An invalid line is reported once, and the following lines are completed."""
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
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(text_of(tokens[:8]) + "\n" for tokens in expected[:3])
    assert done.stderr.count("Prompt has 65 tokens, 1 more than the model's context") == 1


@contextmanager
def generating(checkpoint: Path, *overrides: str) -> Iterator[tuple[Any, bytes]]:
    """Run the program until it is in the middle of a text; yield it and its output so far."""
    process = subprocess.Popen(
        [
            *(sys.executable, "generate.py", f"checkpoint={checkpoint}", "max_new_tokens=200000"),
            *(f"prompt={SPECIAL_CHARACTERS}", "parallel.accelerator=cpu", *overrides),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        output = first = os.read(process.stdout.fileno(), 2**16)
        while len(output) < len(SPECIAL_CHARACTERS) + 20:
            output += os.read(process.stdout.fileno(), 2**16)
        assert len(first) < 1000, "the text was printed in blocks, not token by token"
        yield process, output
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_exits_all_processes_without_output(endless: Path) -> None:
    with generating(endless, "parallel.tp=2") as (process, output):
        assert output.startswith(SPECIAL_CHARACTERS.encode())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        errors = process.stderr.read()  # returns when all processes have closed it
        assert errors == b"", errors.decode()


def test_closed_stdout_is_not_an_error(endless: Path) -> None:
    with generating(endless) as (process, output):
        assert output.startswith(SPECIAL_CHARACTERS.encode())
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""
        process.stdout = None
