"""Validation of configurations: plain values become frozen dataclasses, or one `ConfigError`.

Types, bounds, choices and unknown keys are checked by pydantic as the dataclasses declare them;
rules that tie sections together are functions whose parameters name those sections. All errors are
reported together, each with key, value, rule and remedy. Has no knowledge of Hydra.
"""

import dataclasses
import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from data.errors import shortened
from training.key_suggestions import alternatives, explanation, named_keys, similar_keys

Rule = Callable[..., Iterable[str]]
"""Return error messages; each parameter is named for a section of the configuration."""

Config = TypeVar("Config")

NOT_A_NUMBER = "is not a number; use a number or a named choice"
NOT_A_TEXT = "is not a text; quote it in YAML, which reads no, off, yes and on as false and true"
UNKNOWN = "unexpected_keyword_argument"  # pydantic's name for an unknown key of a dataclass


class ConfigError(ValueError):
    """All errors of a configuration.

    Attributes:
        errors: One message per error.
    """

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = [shortened(error) for error in errors]
        super().__init__("\n".join(f"  - {error}" for error in self.errors))


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def validate(
    values: dict[str, Any],
    schema: type[Config],
    rules: Sequence[Rule] = (),
    prefix: str = "",
    in_file: bool = False,
) -> Config:
    """Return `values` as an instance of the dataclass `schema`.

    Args:
        rules: Applied when every section that a rule names is valid on its own.
        prefix: Written before each key in messages, such as `hardware.`.
        in_file: A file has all values, to which the user adds a missing key.

    Raises:
        ConfigError: unknown keys, wrong types, broken bounds and broken rules, all together.
    """
    from pydantic import ValidationError  # 0.1 s that `--help` does not need

    config = None
    by_key: dict[str, list[Any]] = {}
    try:
        config = _adapter(schema).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        for item in error.errors():  # a union reports one error per member
            by_key.setdefault(_dotted(item, values), []).append(item)
    errors = [
        line
        for key, items in by_key.items()
        if not any(other.startswith(f"{key}[") for other in by_key)  # an item of this list
        for line in _message(prefix, key, items, schema, values, in_file).split("\n")
    ]
    sections, wrong = _valid_sections(values, schema, prefix)
    errors += [*wrong, *_rule_errors(rules, sections)]
    if errors or config is None:
        raise ConfigError(errors)
    return config


def broken_rules(values: dict[str, Any], schema: Any, rules: Sequence[Rule]) -> list[str]:
    """Return the errors of the rules whose sections are valid on their own."""
    return _rule_errors(rules, _valid_sections(values, schema)[0])


def _valid_sections(
    values: dict[str, Any], schema: Any, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Return the valid sections, and the errors of numbers that pydantic accepts."""
    from pydantic import ValidationError

    sections: dict[str, Any] = {}
    errors: list[str] = []
    defaults = _defaults(schema)
    for name, annotation in fields_of(schema).items():
        if name not in values:
            if name in defaults:
                sections[name] = defaults[name]
            continue
        with suppress(ValidationError):  # reported by `validate`; unknown keys keep the rules
            section = _adapter(annotation).validate_python(values[name], extra="ignore")
            if wrong := [
                *_booleans_as_numbers(prefix + name, values[name], section),
                *_infinite(prefix + name, section),
            ]:
                errors += wrong
            else:
                sections[name] = section
    return sections, errors


def _defaults(schema: Any) -> dict[str, Any]:
    """Return the values of omitted fields, without those that must be given."""
    missing = dataclasses.MISSING
    made = {
        each.name: each.default if each.default_factory is missing else each.default_factory()
        for each in dataclasses.fields(schema)
    }
    return {name: value for name, value in made.items() if value is not missing}


def _rule_errors(rules: Sequence[Rule], sections: dict[str, Any]) -> list[str]:
    errors: list[str] = []
    for rule in rules:
        names = inspect.signature(rule).parameters
        if names.keys() <= sections.keys():
            errors += rule(**{name: sections[name] for name in names})
    return errors


@cache
def _adapter(annotation: Any) -> Any:
    """Return pydantic's validator of a type, which takes longer to build than to apply."""
    from pydantic import TypeAdapter

    return TypeAdapter(annotation)


def annotations_along(schema: Any, path: Sequence[str]) -> Iterator[Any]:
    """Yield the annotation of each name of a path, until a name is unknown.

    Names below a dict or a list are its keys.
    """
    annotation = schema
    for name in path:
        containers = [one for one in _members(annotation) if get_origin(one) in (dict, list)]
        annotation = get_args(containers[0])[-1] if containers else fields_of(annotation).get(name)
        if annotation is None:
            return
        yield annotation


def fields_of(annotation: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, also in `X | None`, with their annotations."""
    for member in _members(annotation):
        if dataclasses.is_dataclass(member):
            hints = get_type_hints(member, include_extras=True)
            return {field.name: hints[field.name] for field in dataclasses.fields(member)}
    return {}


def field_at(schema: Any, key: str) -> Any:
    """Return the annotation of a dotted key, or None if the schema does not have it."""
    path = key.split(".")
    found = list(annotations_along(schema, path))
    return found[-1] if len(found) == len(path) else None


def takes_text(schema: Any, key: str) -> Literal["required", "optional"] | None:
    """Return whether a dotted key holds free text (`str`), and whether it may be null instead."""
    members = set(map(str, _members(field_at(schema, key))))
    if str(str) not in members or not members <= {str(str), str(type(None))}:
        return None
    return "required" if members == {str(str)} else "optional"


def known_keys(schema: Any, prefix: str = "", values: Any = None) -> Iterator[str]:
    """Yield the dotted keys of a schema; names below a dict are those in `values`, or `NAME`."""
    for name, annotation in fields_of(schema).items():
        inner = values.get(name) if isinstance(values, dict) else None
        key = f"{prefix}{name}"
        mappings = [each for each in _members(annotation) if get_origin(each) is dict]
        if mappings and fields_of(get_args(mappings[0])[1]):
            named = inner if isinstance(inner, dict) and inner else {"NAME": None}
            for each, value in named.items():
                yield from known_keys(get_args(mappings[0])[1], f"{key}.{each}.", value)
        elif fields_of(annotation):
            yield from known_keys(annotation, f"{key}.", inner)
        else:
            yield key


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return [inner for one in get_args(annotation) for inner in _members(one)]
    return [annotation]


def _dotted(item: Any, values: Any) -> str:
    """Return the dotted key of a pydantic error, without the names of union members."""
    key = ""
    absent = item["type"] in ("missing", UNKNOWN)
    for part in item["loc"]:
        known = part in values if isinstance(values, dict) else isinstance(part, int)
        if known or (absent and part == item["loc"][-1]):
            key += f"[{part}]" if isinstance(values, list) else f".{part}"
            try:
                values = values[part] if known else None
            except IndexError:  # the list is too short
                values = None
    return key.removeprefix(".")


def _message(
    prefix: str, key: str, items: list[Any], schema: Any, values: Any, in_file: bool
) -> str:
    """Return the message of one key from pydantic's errors."""
    item, name = items[0], prefix + key
    kind, value = item["type"], item["input"]
    path = key.replace("[", ".").replace("]", "").split(".")
    annotations = list(annotations_along(schema, path))
    if kind == "value_error":  # raised by __post_init__, one message per line
        return str(item["ctx"]["error"])
    if kind == UNKNOWN:
        known = fields_of(annotations[-1] if annotations else schema)
        # An unknown section is reported by its keys: `training.steps` is train.max_steps.
        unknown = [f"{key}.{each}" for each in value] if isinstance(value, dict) else [key]
        keys = list(known_keys(schema, values=values))
        return "\n".join(
            _unknown_key(prefix, each, () if each != key else known, keys) for each in unknown
        )
    if kind == "dataclass_type":
        inner = ", ".join(f"{name}.{each}" for each in fields_of(annotations[-1]))
        return f"{name}={shown(value)} is not a section; set its keys: {inner}"
    if kind == "missing":
        above, inside, _ = name.partition("[")
        where = f"{key} to the file" if in_file else f"{name}=… to the command"
        return f"{name} has no value; add {f'it to the list {above}' if inside else where}"
    if isinstance(value, bool) and takes_text(schema, ".".join(path)):
        return f"{name}={shown(value)} {NOT_A_TEXT}"
    if isinstance(value, bool) and any(each["type"] != "literal_error" for each in items):
        return f"{name}={shown(value)} {NOT_A_NUMBER}"
    if [each["type"] for each in items] == ["list_type"] and (value is None or value == ""):
        return f"{name}={shown(value)} is not a list; use {name}=[], or a list of values"
    if [each["type"] for each in items] == ["list_type"] and isinstance(value, str):
        return f"{name}={value!r} is not a list; use '{name}=[{json.dumps(value)}]'"
    pairs = [_rule_and_remedy(each) for each in items]
    rule = next((rule for rule, _ in reversed(pairs) if rule), "has the wrong type")
    remedy = " or ".join(remedy for _, remedy in pairs)
    if isinstance(value, str | int | float):
        remedy = remedy.replace("a valid list", f"a list: {name}=[{value}]")
        for ending, unit in UNITS.items():
            if name.endswith(ending):
                remedy = remedy.replace("a valid number", f"a number of {unit}")
        remedy = remedy.replace("a valid integer", _without_suffix(name, str(value)))
    is_item = key.endswith("]")  # null would be valid for the list, not for an item of it
    if annotations and type(None) in _members(annotations[-1]) and not is_item:
        remedy = remedy.replace(" or ", ", ") + " or null"  # "a, b or c" becomes "a, b, c or null"
    return f"{name}={shown(value)} {rule}; use {remedy}"


SUFFIXES = {"k": "e3", "M": "e6", "B": "e9", "G": "e9", "T": "e12"}
UNITS = {"time_limit": "minutes", "_minutes": "minutes", "_seconds": "seconds"}  # by key


def _without_suffix(name: str, value: str) -> str:
    """Return the remedy for an integer, written as the number if it has a suffix such as 15T."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kMBGT])", value)
    if number is None or name.endswith("seq_len"):  # whose 8k is 8,192
        return "a valid integer"
    return f"{name}={number[1]}{SUFFIXES[number[2]]}"


def _unknown_key(prefix: str, key: str, known: Iterable[str], keys: Sequence[str]) -> str:
    """Return the message for an unknown key.

    Args:
        known: The names of the key's section, none if that is unknown.
        keys: All dotted keys of the schema.
    """
    name = f"{prefix}{key}"
    if explained := explanation(keys, key):
        return f"Unknown key {name}: {explained}"
    above, _, last = key.rpartition(".")
    named = named_keys(keys, key)
    same = {each.rpartition(".")[2] for each in named}
    near = [each for each in known if each in same]
    near = near or ([] if named else difflib.get_close_matches(last, known, n=1))
    in_section = [f"{above}.{each}".lstrip(".") for each in near]
    if meant := in_section or named or similar_keys(keys, key):
        return (
            f"Unknown key {name}. Did you mean {alternatives([prefix + each for each in meant])}?"
        )
    sections = dict.fromkeys(each.partition(".")[0] for each in keys)
    section = key.partition(".")[0]
    if section not in sections and (near := difflib.get_close_matches(section, sections, n=1)):
        return f"Unknown key {name}. Did you mean {near[0]}?"
    known = known or sections
    return f"Unknown key {name}. Known keys: {', '.join(known)}"


RULES = {  # pydantic's error type: rule and remedy, for its first parameter
    "literal_error": ("is not a valid choice", "{}"),
    "string_too_short": ("is empty", "a non-empty text"),
    "too_short": ("is empty", "a list with at least one item"),
    "greater_than_equal": ("is below {}", "at least {}"),
    "greater_than": ("is not above {}", "a number above {}"),
    "less_than_equal": ("is above {}", "at most {}"),
    "less_than": ("is not below {}", "a number below {}"),
}


def _rule_and_remedy(item: Any) -> tuple[str, str]:
    """Return the rule that a value breaks, empty for a wrong type, and its remedy."""
    if item["type"] not in RULES:
        expected = item["msg"].removeprefix("Input should be ").partition(",")[0]
        expected = expected.replace("a valid tuple", "a list")
        return "", "a smaller number" if item["type"] == "int_parsing_size" else expected
    limit = next(iter(item["ctx"].values()))
    if limit == math.inf:
        return "is not finite", "a finite number"
    limit = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
    rule, remedy = RULES[item["type"]]
    return rule.format(limit), remedy.format(limit).replace("'", "")


def shown(value: Any) -> str:
    """Return a value in command-line syntax."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _booleans_as_numbers(key: str, given: Any, validated: Any) -> Iterator[str]:
    """Yield an error for each true or false that pydantic has converted to 1 or 0."""
    if isinstance(given, bool) and not isinstance(validated, bool):
        yield f"{key}={shown(given)} {NOT_A_NUMBER}"
    elif isinstance(given, dict):
        for name, value in given.items():
            fields = validated if isinstance(validated, dict) else vars(validated)
            yield from _booleans_as_numbers(f"{key}.{name}", value, fields.get(name, value))
    elif isinstance(given, list | tuple):
        for index, (value, taken) in enumerate(zip(given, validated, strict=True)):
            yield from _booleans_as_numbers(f"{key}[{index}]", value, taken)


def _infinite(key: str, value: Any) -> Iterator[str]:
    """Yield an error for each NaN or infinite number, which JSON files cannot hold."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key}={value} is not finite; use a finite number, or null for a limit that is off"
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _infinite(f"{key}.{name}", each)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _infinite(f"{key}[{index}]", each)
