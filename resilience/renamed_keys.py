"""Renamed configuration keys: command lines and run folders of older versions stay valid."""

from typing import Any

RENAMED_KEYS = {
    "faults.max_in_a_row": "faults.max_consecutive_skips",
    "data.stream_lanes": "data.stream_shards",
}


def rename_keys(config: dict[str, Any]) -> dict[str, str]:
    """Move the values of renamed keys to their new names, in place, also in `run.allow_changes`.

    Returns:
        The keys that were found: old name to new name.
    """
    found = {}
    for old, new in RENAMED_KEYS.items():
        section, name = old.split(".")
        values = config.get(section)
        if isinstance(values, dict) and name in values:
            values[new.rpartition(".")[2]] = values.pop(name)
            found[old] = new
    run = config.get("run")
    allowed = run.get("allow_changes") if isinstance(run, dict) else None
    if isinstance(allowed, list):
        found |= {old: RENAMED_KEYS[old] for old in allowed if old in RENAMED_KEYS}
        allowed[:] = [RENAMED_KEYS.get(name, name) for name in allowed]
    return found
