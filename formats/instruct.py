"""Files next to weights that define how an instruct model is prompted and where its answers end.

The chat template is Jinja text in `chat_template.jinja` or in `tokenizer_config.json`. It is code
of unknown origin, so it is rendered in Jinja's sandbox, with the functions of transformers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from data.files import parse_json, read_file
from data.tokenizer import BOS_TOKEN, EOS_TOKEN, Tokenizer
from formats.detection import find_checkpoint
from formats.errors import FormatError
from formats.tokenizers import LLAMA3_CHAT_TEMPLATE, stop_token_ids
from formats.weights import Weights

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
        origin: The file it was read from, for messages.
        names: Special tokens that the template uses, such as `bos_token`.
    """

    text: str
    origin: str
    names: dict[str, str]

    def render(self, messages: Messages) -> str:
        """Return the prompt for an assistant's answer, or a last assistant's message to continue.

        Raises:
            FormatError: The template rejects the messages, or is invalid.
        """
        continues = messages[-1].get("role") == "assistant"
        try:
            text: str = self._compiled().render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=not continues,
                **self.names,
            )
        except Exception as error:  # templates are code
            raise FormatError(
                f"the chat template of {self.origin} cannot render the messages "
                f"({type(error).__name__}: {error}); change the messages, or put another "
                "chat_template.jinja next to the tokenizer"
            ) from None
        if not continues:
            return text
        final = str(messages[-1].get("content") or "")
        start = text.rfind(final.strip())
        if start < 0:
            raise FormatError(
                f"the chat template of {self.origin} changes the last message, which can then not "
                "be continued; end the messages with role=user"
            )
        kept = final.lstrip() if text.startswith(final.lstrip(), start) else final.strip()
        return text[: start + len(kept)]

    def _compiled(self) -> Any:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def fail(message: str) -> None:
            raise TemplateError(message)

        def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
            return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})

        class Generation(Extension):
            """The block `generation`, which marks text of the assistant for training."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = fail
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        return environment.from_string(self.text)


def prompt_folders(weights: Weights, tokenizer_path: str | None) -> list[Path]:
    """Return the folders to search for a chat template: of the tokenizer and of the weights.

    A run that was initialized from weights has no files of its own.
    """
    folders = [weights.folder]
    if tokenizer_path not in ("auto", None):
        path = find_checkpoint(Path(tokenizer_path), verify=False)
        folders.insert(0, path if path.is_dir() else path.parent)
    if initial := (weights.config.get("run") or {}).get("init_from"):
        folders.append(Path(initial).expanduser())
    return folders


def find_chat_template(folders: Sequence[Path], tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template in the first folder that has one, or Llama 3's for its tokenizer.

    Raises:
        FormatError: There is none, or a file is damaged.
    """
    names = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}
    for folder in folders:
        config = _read(folder / "tokenizer_config.json")
        stored = {name: _content(config[name]) for name in config if name.endswith("_token")}
        named = names | {name: content for name, content in stored.items() if content is not None}
        file = folder / "chat_template.jinja"
        if file.is_file():
            return ChatTemplate(_read_text(file), str(file), named)
        for path, values in (
            (folder / "tokenizer_config.json", config),
            (folder / "chat_template.json", _read(folder / "chat_template.json")),
        ):
            text = values.get("chat_template")
            if isinstance(text, list):  # several templates by name
                text = {_name(each): each["template"] for each in text if _name(each)}
            if isinstance(text, dict):
                if "default" not in text:
                    raise FormatError(
                        f"{path} has the chat templates {', '.join(text)}, but none is named "
                        "default; put the one to use in chat_template.jinja next to it"
                    )
                text = text["default"]
            if isinstance(text, str):
                return ChatTemplate(text, str(path), named)
            if text is not None:
                raise FormatError(
                    f"{path}: chat_template is not a text; put the template to use in "
                    "chat_template.jinja next to it"
                )
    if tokenizer.name == "llama3":
        return ChatTemplate(LLAMA3_CHAT_TEMPLATE, "Llama 3", names)
    raise FormatError(
        f"{folders[0]} has no chat template, and its tokenizer lacks Llama 3's special tokens; put "
        "chat_template.jinja there, or prompt with plain text"
    )


def end_token_ids(folder: Path, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids that end a generated text: the tokenizer's and those of the folder's files."""
    found: list[Any] = [] if tokenizer is None else [*stop_token_ids(tokenizer)]
    for name in ("generation_config.json", "config.json"):
        ids = _read(folder / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(each for each in found if isinstance(each, int)))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}); save it as text in UTF-8") from None


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no file.

    Raises:
        FormatError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        values = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}); download or copy it again") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path} is not a JSON object; download or copy it again")
    return values


def _name(template: Any) -> str | None:
    """Return the name of a template in a list of templates; None for anything else."""
    is_template = isinstance(template, dict) and isinstance(template.get("template"), str)
    return str(template.get("name")) if is_template else None


def _content(token: Any) -> str | None:
    """Return the text of a special token, which some files store as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
