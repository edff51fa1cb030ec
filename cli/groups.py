"""The groups of conf/: their files, and errors for a file or a group that does not exist."""

import re
import shlex
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

CONF = Path(__file__).parent.parent / "conf"


def groups_of(program: str) -> dict[str, str]:
    """Return the groups in the defaults list of a program, with the file that is its default."""
    text = (CONF / f"{program}.yaml").read_text(encoding="utf-8")
    defaults = text.partition("\ndefaults:\n")[2].partition("\n\n")[0]
    groups: dict[str, str] = {}
    for line in defaults.splitlines():
        name, _, value = line.partition("#")[0].strip().removeprefix("- ").partition(":")
        if value:
            groups[name] = value.strip()
        elif (CONF / f"{name}.yaml").is_file():
            groups |= groups_of(name)
    return groups


def group_files(group: str, folders: Sequence[Path] = (CONF,)) -> list[str]:
    """Return the names of a group's files."""
    roots = [folder / group for folder in folders]
    return sorted(
        {
            str(path.relative_to(root).with_suffix(""))
            for root in roots
            for path in root.rglob("*.yaml")
        }
    )


def group_errors(group: str, value: str, folders: Sequence[Path]) -> Iterator[str]:
    """Yield an error for each name in `group=value` that is not a file of the group."""
    known = group_files(group, folders)
    listed = re.fullmatch(r"\[(.*)\]", value)
    for name in listed[1].split(",") if listed else [value]:
        name = name.strip()
        if name in known or (name == "null" and group in ("experiment", "hardware")):
            continue
        path = Path(name)
        plain_name = path.stem if path.suffix in (".yaml", ".yml") else name
        by_spelling = {re.sub(r"\W|_", "", each).lower(): each for each in known}
        near = get_close_matches(re.sub(r"\W|_", "", plain_name).lower(), by_spelling, n=2)
        remedy = f"did you mean {' or '.join(f'{group}={by_spelling[each]}' for each in near)}? "
        remedy = remedy if near else ""
        if group == "data" and name and path.exists():
            own = shlex.quote(f"data.sources.text.path={name}")
            remedy = f"for your own text use data=text data.name={path.stem or 'NAME'} {own}. "
        elif group == "model" and name and path.is_dir():
            remedy = f"to start from weights use {shlex.quote(f'run.init_from={name}')}. "
        yield (
            f"{group}={name} is not a file in conf/{group}; {remedy}"
            f"{'Choices' if remedy else 'choices'}: {', '.join(known)}"
        )


def foreign_group_error(group: str, value: str, program: str, groups: Sequence[str]) -> str:
    """Return the error for a group of another program."""
    own = f"its groups are {', '.join(groups)}" if groups else "it has no groups"
    remedy = f"remove it ({own})"
    if program == "evaluate" and group == "data":
        remedy = "use evaluation.data=FOLDER, with a folder that prepare.py or train.py has written"
    elif program in ("evaluate", "generate", "convert") and group in ("tokenizer", "model"):
        key = "tokenizer_path=FILE" if group == "tokenizer" else "checkpoint=FOLDER"
        remedy = f"use {key}"
    return f"{group}={value} is not an argument of {program}.py; {remedy}"
