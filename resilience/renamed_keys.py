"""Renamed configuration keys: command lines and run folders of older versions stay valid."""

from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {
    "faults.max_in_a_row": "faults.max_consecutive_skips",
    "data.stream_lanes": "data.stream_shards",
}


# Of single programs; in `train.py`, `checkpoint` is a section.
EVALUATE_KEYS = {"evaluation.checkpoint": "checkpoint"}
CONVERT_KEYS = {"source": "checkpoint"}


def rename_keys(
    config: dict[str, Any], renamed: Mapping[str, str] = RENAMED_KEYS
) -> dict[str, str]:
    """Move the values of renamed keys to their new names, in place, also in `run.allow_changes`.

    Returns:
        The keys that were found: old name to new name.
    """
    found = {}
    for old, new in renamed.items():
        values, name = _section_of(config, old)
        new_values, new_name = _section_of(config, new)
        if isinstance(values, dict) and isinstance(new_values, dict) and name in values:
            new_values[new_name] = values.pop(name)
            found[old] = new
    run = config.get("run")
    allowed = run.get("allow_changes") if isinstance(run, dict) else None
    if isinstance(allowed, list):
        for index, name in enumerate(allowed):
            if isinstance(name, str) and name in RENAMED_KEYS:
                found[name] = allowed[index] = RENAMED_KEYS[name]
    return found


def _section_of(config: dict[str, Any], key: str) -> tuple[Any, str]:
    """Return the section that a dotted key belongs to, or None, and the key's last name."""
    section, _, name = key.rpartition(".")
    return (config.get(section) if section else config), name
