"""Errors for command-line arguments that are not `key=value`, with the argument as it should be:

`--lr 1e-3`, `lr: 1e-3`, `optim.lr = 1e-3`, a key or an option without a value, and names of other
trainers (`training.key_suggestions`).
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cli.groups import group_files, groups_of
from training.config_validation import field_at, known_keys, takes_text
from training.key_suggestions import alternatives, explanation, named_keys, similar_keys

KEY = re.compile(r"[A-Za-z_$][\w-]*(\.[\w-]+)*", re.ASCII)  # a dotted key or a group
USAGE = "arguments are key=value, group=file or ~key; --help lists them"
OPTIONS = ("--help", "--version", "--cfg", "--config-dir", "--config-name")
OPTIONS_USAGE = "options are --help, --version and --cfg job; keys are written key=value"


def word_errors(
    words: Sequence[str], program: str, schema: Any, folders: Sequence[Path]
) -> Iterator[str]:
    """Yield an error for each argument that is not `key=value`, with a suggestion."""
    keys = list(known_keys(schema))
    rest = list(words)
    if written := _named_paths(words, program):
        positional = list(itertools.takewhile(_is_bare, words))
        del rest[: len(positional)]
        yield f"{shlex.join(positional)} without keys; write {written}"
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        following = list(itertools.takewhile(lambda each: not _is_override(each), rest))
        if _is_override(word):
            text = not value or takes_text(schema, name.lstrip("-+")) is not None
            if following and equals and text and not _is_key(following[0], program, schema):
                del rest[: len(following)]
                written = shlex.quote(f"{name}={' '.join([value, *following]).strip()}")
                shown = " ".join(map(repr, following))
                yield f"{shown} after {word}: to make it part of the value, write {written}"
            continue
        if equals and name:
            rule = "lists are set as a whole: data.stages=[{…},{…}]" if "[" in name else USAGE
            yield f"{name} is not a key; {rule}"
            continue
        key = name.lstrip("-+~").removesuffix(":")
        switch = re.match(r"--(no|disable)[-_]", word)  # --no-compile
        key = word[switch.end() :] if switch else key
        candidates = _candidates(key, program, schema)
        explained = explanation(keys, key)
        # `key value`, `key = value`, `key =value`, `key: value`
        parts = _value(following) if candidates or explained or _is_option(word) else []
        del rest[: len(parts)]
        shown = " ".join([word, *parts])
        if explained:
            yield f"{shown} is not a key: {explained}"
        elif candidates and (parts or switch):
            given = "".join(parts).removeprefix("=") or "false"
            pairs = [f"{each}={_text_value(schema, each, given)}" for each in candidates]
            written = alternatives(list(map(shlex.quote, pairs)))
            yield f"{shown} is not key=value; write {written}"
        else:
            meant = [f"{each}={_default(schema, each)}" for each in candidates]
            yield _word_error(word, shown, program, schema, folders, meant)


POSITIONAL = {
    "evaluate": ("checkpoint",),
    "generate": ("checkpoint", "prompt"),
    "convert": ("checkpoint", "target"),
}


def _named_paths(words: Sequence[str], program: str) -> str | None:
    """Return arguments for a command line that starts with paths, without their keys."""
    bare = list(itertools.takewhile(_is_bare, words))
    if not bare or not Path(bare[0]).exists():
        return None
    names = POSITIONAL.get(program, ())
    if names and len(bare) <= len(names):
        return shlex.join(f"{key}={word}" for key, word in zip(names, bare, strict=False))
    path = Path(bare[0])
    if names or len(bare) > 1:
        return None
    if path.suffix in (".yaml", ".yml"):
        return "experiment=NAME, with --config-dir DIR for a folder with your own experiment/*.yaml"
    if (path / "config.yaml").exists():
        return shlex.quote(f"{'inspect' if program == 'prepare' else 'run.dir'}={path}")
    words = ["data=text", f"data.name={path.stem}", f"data.sources.text.path={path}"]
    return f"{shlex.join(words)} for your own text"


def _is_bare(word: str) -> bool:
    """Return whether a word is neither an option nor contains a key."""
    return "=" not in word and not word.startswith(("-", "~"))


def _text_value(schema: Any, key: str, given: str) -> str:
    """Return the value of a switch for its key, which may hold a text such as a project's name."""
    kind = takes_text(schema, key) if given in ("true", "false") else None
    return given if kind is None else "null" if given == "false" and kind == "optional" else "NAME"


def _candidates(name: str, program: str, schema: Any) -> list[str]:
    """Return the keys that a name without a value probably means."""
    if _is_key(name, program, schema):
        return [name]
    keys = list(known_keys(schema))
    return (named_keys(keys, name) or similar_keys(keys, name)) if KEY.fullmatch(name) else []


def _value(following: Sequence[str]) -> Sequence[str]:
    """Return the words that are the value of the key before them."""
    if not following or re.match(r"-+[A-Za-z]", following[0]):
        return []
    return following[: 2 if following[0] == "=" else 1]


def _default(schema: Any, key: str) -> str:
    """Return the value that a key without one means: `true` for a switch."""
    return "true" if "bool" in str(field_at(schema, key)) else "VALUE"


def _is_option(word: str) -> bool:
    """Return whether a word has the form of an option, and is not a misspelt one."""
    return word.startswith("--") and not get_close_matches(word, OPTIONS, n=1, cutoff=0.7)


def _is_override(word: str) -> bool:
    """Return whether an argument has the form `key=value` or `~key`."""
    name, equals, _ = word.partition("=")
    deletes = name.startswith("~") and KEY.fullmatch(name[1:]) is not None
    return deletes or bool(equals and KEY.fullmatch(name.lstrip("-+~")))


def _is_key(word: str, program: str, schema: Any) -> bool:
    """Return whether a word is an option, a known key or a group, without a value."""
    return word.startswith("--") or field_at(schema, word) is not None or word in groups_of(program)


def _word_error(
    word: str, shown: str, program: str, schema: Any, folders: Sequence[Path], meant: list[str]
) -> str:
    """Return the error for a word that has no value next to it.

    Args:
        shown: The word with the value of an unknown option.
        meant: Probable arguments.
    """
    head, colon, tail = word.lstrip("-").partition(":")
    if colon and tail and KEY.fullmatch(head) and (near := _candidates(head, program, schema)):
        return f"{word} is not key=value; write {shlex.quote(f'{near[0]}={tail}')}"
    if word.startswith("-"):
        meant = get_close_matches(word, OPTIONS, n=1, cutoff=0.7) or meant
        hint = f"did you mean {alternatives(meant)}?" if meant else OPTIONS_USAGE
        return f"{shown} is not an option; {hint}"
    files = [
        f"{group}={name}"
        for group in groups_of(program)
        for name in group_files(group, folders)
        if word == name
    ]
    files = [f"--{word}"] if word in ("help", "version") else files
    if meant := files or meant:
        return f"{word} is not key=value; did you mean {alternatives(meant)}?"
    return f"{word!r} is not key=value; {USAGE}"
