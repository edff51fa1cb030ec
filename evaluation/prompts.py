"""Prompts of `generate.py`: read from the command line, a file or standard input, and validated."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from data.tokenizer import Tokenizer

MAX_LISTED = 10  # errors of a prompt file that are listed; further ones are counted


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text, and its token ids with the begin-of-text token."""

    text: str
    ids: list[int]


def read_prompts(
    prompt: str | None, path: str | None, tokenizer: "Tokenizer", model: ModelConfig
) -> tuple[list[Prompt], list[str]]:
    """Return the prompts and the errors found.

    Args:
        prompt: A prompt of the command line, or None.
        path: A prompt file if `prompt` is None: one prompt per line or, in a .jsonl file, one
            object with the key "prompt" per line.
    """
    named, errors = [("prompt", str(prompt))], list[str]()
    if prompt is None:
        named, errors = _read_file(Path(str(path)))
    prompts = [encode_prompt(text, tokenizer) for _, text in named]
    for (name, _), each in zip(named, prompts, strict=True):
        if error := prompt_error(each, model):
            errors.append(f"{name} {error}")
    if len(errors) > MAX_LISTED:
        errors[MAX_LISTED:] = [f"and {len(errors) - MAX_LISTED} more prompts of {path}"]
    return prompts, errors


def encode_prompt(text: str, tokenizer: "Tokenizer") -> Prompt:
    return Prompt(text, [tokenizer.bos_id, *tokenizer.encode(text)])


def prompt_error(prompt: Prompt, model: ModelConfig) -> str | None:
    """Return why a prompt cannot be completed, or None."""
    if not prompt.text:
        return "is empty; use at least one character"
    try:
        prompt.text.encode()
    except UnicodeEncodeError:
        return "is not valid text: it contains an unpaired surrogate or bytes that are not UTF-8"
    excess = len(prompt.ids) - model.max_seq_len
    if excess > 0:
        return (
            f"has {len(prompt.ids):,} tokens, {excess:,} more than the model's context length "
            f"(max_seq_len={model.max_seq_len:,}); shorten it"
        )
    return None


def _read_file(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the name and the text of each prompt, and the errors found."""
    try:
        content = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return [], [f"prompts={path} cannot be read ({reason}); use a text file in UTF-8"]
    lines = content.removesuffix("\n").split("\n") if content.strip() else []
    if not lines:
        return [], [f"prompts={path} contains no prompts; write one prompt per line"]
    named = [(f"prompts={path} line {n}", line) for n, line in enumerate(lines, start=1)]
    if path.suffix != ".jsonl":
        return [(name, line.removesuffix("\r")) for name, line in named], []
    found, errors = [], []
    for name, line in named:
        try:
            text = json.loads(line)["prompt"]
            assert isinstance(text, str)
        except (ValueError, TypeError, KeyError, AssertionError):
            errors.append(f'{name} is not an object with a string "prompt": {line[:80]}')
        else:
            found.append((name, text))
    return found, errors


def interactive_prompts(
    fabric: "Fabric", tokenizer: "Tokenizer", model: ModelConfig
) -> Iterator[Prompt]:
    """Yield each line that rank 0 reads from standard input, on all ranks; skip empty lines."""
    import torch.distributed as dist

    # A separate group, since reading a prompt may take longer than any timeout.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    lines = _valid_lines(tokenizer, model)
    while True:
        prompt: list[Any] = [next(lines, None) if fabric.is_global_zero else None]
        dist.broadcast_object_list(prompt, group=group)
        if prompt[0] is None:
            return
        yield prompt[0]


def _valid_lines(tokenizer: "Tokenizer", model: ModelConfig) -> Iterator[Prompt]:
    """Yield the valid prompts from standard input and print the errors of the others."""
    mark = "> " if sys.stdin.isatty() else ""
    print(mark, end="", file=sys.stderr, flush=True)
    for line in iter(sys.stdin.buffer.readline, b""):
        prompt = encode_prompt(line.decode(errors="surrogateescape").rstrip("\r\n"), tokenizer)
        if (error := prompt_error(prompt, model)) is None:
            yield prompt
        elif prompt.text:
            print(f"Prompt {error}", file=sys.stderr, flush=True)
        print(mark, end="", file=sys.stderr, flush=True)
    if mark:
        print(file=sys.stderr)  # end the line of the mark
