"""Prompts of `generate.py`: read from the command line, a file or standard input, and validated."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import parse_json
from evaluation.detokenizer import detokenize
from model.config import ModelConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from data.tokenizer import Tokenizer
    from formats.instruct import ChatTemplate

NOT_A_PROMPT = (
    'is not an object with either "prompt" (a string or token ids) or "messages" (a list)'
)
MAX_LISTED = 10  # errors of a prompt file that are listed; further ones are counted


@dataclass(frozen=True)
class Prompt:
    """What a completion continues.

    Attributes:
        text: As shown before the completion; empty for messages.
        ids: Token ids, with the begin-of-text token unless the ids were given.
        record: Fields of the prompt's line in a .jsonl file that its completion repeats.
    """

    text: str
    ids: list[int]
    record: dict[str, Any] = field(default_factory=dict)


class PromptEncoder:
    """Encode and validate prompts for one model.

    Args:
        tokenizer: None to accept token ids only.
        folders: Where to look for the chat template.
        chat: Whether a text is the message of a user.
        system: Message before each conversation that has none of this role.
    """

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: "Tokenizer | None",
        folders: Sequence[Path] = (),
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.folders = model, tokenizer, folders
        self.chat, self.system = chat, system

    @cached_property
    def template(self) -> "ChatTemplate":
        from formats.instruct import find_chat_template

        assert self.tokenizer is not None
        return find_chat_template(self.folders, self.tokenizer)

    def encode(self, prompt: Any) -> Prompt:
        """Return a prompt from a text, from token ids or from messages.

        Raises:
            ValueError: It cannot be completed; the message continues "prompt …".
        """
        from formats.errors import FormatError

        is_messages = isinstance(prompt, list) and any(isinstance(each, dict) for each in prompt)
        try:
            if isinstance(prompt, list) and not is_messages:
                encoded = self._from_ids(prompt)
            elif self.tokenizer is None:
                raise ValueError(
                    "is text, but tokenizer_path=null; use token ids, or tokenizer_path=auto"
                )
            elif is_messages:
                encoded = self._from_messages(prompt)
            elif self.chat:
                message = {"role": "user", "content": prompt}
                encoded = replace(self._from_messages([message]), record={"prompt": prompt})
            elif self.system is not None:
                raise ValueError(
                    "is plain text, on which system has no effect; add chat=true, or omit system"
                )
            else:
                _check_text(prompt)
                ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
                encoded = Prompt(prompt, ids, {"prompt": prompt})
        except FormatError as error:
            raise ValueError(f"cannot be encoded: {error}") from None
        excess = len(encoded.ids) - self.model.max_seq_len
        if excess > 0:
            raise ValueError(
                f"has {len(encoded.ids):,} tokens, {excess:,} more than the model's context length "
                f"(max_seq_len={self.model.max_seq_len:,}); shorten it"
            )
        return encoded

    def _from_ids(self, ids: list[Any]) -> Prompt:
        vocab_size = self.model.vocab_size
        if not ids:
            raise ValueError("has no token ids; use at least one, such as begin-of-text")
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(
                    f"has the token id {token!r}; use whole numbers from 0 to {vocab_size - 1}"
                )
        text = "" if self.tokenizer is None else detokenize(self.tokenizer, ids)
        return Prompt(text, ids, {"prompt": ids})

    def _from_messages(self, given: list[Any]) -> Prompt:
        assert self.tokenizer is not None
        messages = [_message(each) for each in given]
        if messages[-1]["role"] == "assistant" and not messages[-1].get("content"):
            raise ValueError(
                "ends with an empty message of the assistant; leave it out, or give it a text"
            )
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        ids = self.tokenizer.encode_with_specials(self.template.render(messages))
        if not ids:
            raise ValueError(
                f"is empty in the chat template of {self.template.origin}; put another "
                "chat_template.jinja next to the tokenizer"
            )
        return Prompt("", ids, {"messages": given})


def _message(given: Any) -> dict[str, Any]:
    """Return a message whose content is one text, also if it is given as a list of text parts.

    Raises:
        ValueError: It has no role, no content, or content other than text.
    """
    message = given if isinstance(given, dict) else {}
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if other := [part.get("type") for part in content if not isinstance(part.get("text"), str)]:
            raise ValueError(f"has a message with content of type {other[0]}; use text")
        content = "".join(part["text"] for part in content)
    # The text of a message that calls tools is null.
    is_valid = isinstance(content, str) or (content is None and "tool_calls" in message)
    if not is_valid or not isinstance(message.get("role"), str):
        shown = json.dumps(given)[:80]
        raise ValueError(f"has the message {shown}; each needs a role and a text as content")
    _check_text(json.dumps(given, ensure_ascii=False))
    return {**message, "content": content or ""}


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "is not valid text: it contains an unpaired surrogate or bytes that are not UTF-8"
        ) from None


def read_prompts(
    prompt: str | None, path: str | None, encoder: PromptEncoder
) -> tuple[list[Prompt], list[str]]:
    """Return the prompts and the errors found.

    Args:
        prompt: A prompt of the command line, or None.
        path: A prompt file if `prompt` is None: one prompt per line or, in a .jsonl file, one
            object per line with the key "prompt" (a text or token ids) or "messages", and
            optionally "id".
    """
    named: list[tuple[str, dict[str, Any] | str]] = [("prompt", {"prompt": prompt})]
    prompts, errors = list[Prompt](), list[str]()
    if prompt is None:
        try:
            named = list(_read_file(Path(str(path))))
        except ValueError as error:
            return [], [str(error)]
    for name, record in named:
        try:
            if isinstance(record, str):
                raise ValueError(record)
            _check_text(json.dumps(record.get("id"), ensure_ascii=False))
            found = encoder.encode(record.get("messages", record.get("prompt")))
        except ValueError as error:
            errors.append(f"{name} {error}")
        else:
            known = {"id": record["id"]} if "id" in record else {}
            prompts.append(replace(found, record=known | found.record))
    if len(errors) > MAX_LISTED:
        errors[MAX_LISTED:] = [f"and {len(errors) - MAX_LISTED} more prompts of {path}"]
    return prompts, errors


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the name of each prompt in a file, with its record or what is wrong with it.

    Raises:
        ValueError: The file cannot be read or contains no prompts.
    """
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"prompts={path} cannot be read ({reason}); use a text file in UTF-8"
        raise ValueError(message) from None
    if path.suffix.lower() == ".json":
        raise ValueError(
            f"prompts={path} is not a list of lines; write one object per line to a .jsonl file"
        )
    if not content.strip():
        raise ValueError(f"prompts={path} contains no prompts; write one prompt per line")
    is_json = path.suffix.lower() == ".jsonl"
    # str.splitlines would also split at characters within a text, such as U+2028.
    for number, line in enumerate(content.rstrip("\r\n").split("\n"), start=1):
        name = f"prompts={path} line {number}"
        if not (line.strip() if is_json else line.removesuffix("\r")):
            continue
        if is_json:
            yield name, _record(line) or f"{NOT_A_PROMPT}: {line[:80]}"
        else:
            yield name, {"prompt": line.removesuffix("\r")}


def _record(line: str) -> dict[str, Any] | None:
    """Return the object in a line of a prompt file; None if it has no prompt of a known type."""
    try:
        record = parse_json(line, parse_constant=_not_json)
    except ValueError:
        return None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        return None
    if "messages" in record:
        messages = record["messages"]
        is_valid = isinstance(messages, list) and messages
        return record if is_valid and all(isinstance(each, dict) for each in messages) else None
    return record if isinstance(record["prompt"], str | list) else None


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def interactive_prompts(fabric: "Fabric", encoder: PromptEncoder) -> Iterator[Prompt]:
    """Yield each line that rank 0 reads from standard input, on all ranks; skip empty lines."""
    import torch.distributed as dist

    # A separate group, since reading a prompt may take longer than any timeout.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    lines = _valid_lines(encoder)
    while True:
        prompt: list[Any] = [next(lines, None) if fabric.is_global_zero else None]
        dist.broadcast_object_list(prompt, group=group)
        if prompt[0] is None:
            return
        yield prompt[0]


def _valid_lines(encoder: PromptEncoder) -> Iterator[Prompt]:
    """Yield the valid prompts from standard input and print the errors of the others."""
    mark = "> " if sys.stdin.isatty() else ""
    print(mark, end="", file=sys.stderr, flush=True)
    for line in iter(sys.stdin.buffer.readline, b""):
        if text := line.decode(errors="surrogateescape").rstrip("\r\n"):
            try:
                prompt = encoder.encode(text)
            except ValueError as error:
                print(f"Prompt {error}", file=sys.stderr, flush=True)
            else:
                yield prompt
        print(mark, end="", file=sys.stderr, flush=True)
    if mark:
        print(file=sys.stderr)  # end the line of the mark
