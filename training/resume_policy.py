"""Which keys may change when a run resumes: free, with an explicit override, or never.

The policy of a key is declared on its field (`model.config_base.ResumePolicy`); a policy on a
section applies to all keys below that do not declare their own. This module compares the
configurations of two launches and formats the errors. Imports nothing heavy.
"""

import dataclasses
import difflib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from model.config_base import ResumePolicy
from resilience.rewinds import FILE_NAME as REWINDS_FILE
from resilience.run_folder import RunFolderError
from training.config import JobConfig
from training.config_validation import annotations_along

REMOVED_KEY = ResumePolicy("override", "a setting that this version does not have")


def policy_of(key: str) -> ResumePolicy | None:
    """Return the policy declared closest to a dotted key, or None."""
    found = None
    for annotation in annotations_along(JobConfig, key.split(".")):
        for each in getattr(annotation, "__metadata__", ()):  # of Annotated
            found = each if isinstance(each, ResumePolicy) else found
    return found


Difference = list[Any]  # [before, now], as the event log stores it


@dataclass(frozen=True)
class Changes:
    """Changes of the configuration since the last launch, as `{key: [before, now]}`.

    Attributes:
        free: Changes that need no override.
        allowed: Changes listed in `run.allow_changes`.
        unlisted: Changes that need to be listed there and are not.
        forbidden: Changes that no override permits.
    """

    free: dict[str, Difference] = field(default_factory=dict)
    allowed: dict[str, Difference] = field(default_factory=dict)
    unlisted: dict[str, Difference] = field(default_factory=dict)
    forbidden: dict[str, Difference] = field(default_factory=dict)

    def rows(self) -> list[str]:
        """Return a line for each change that takes effect."""
        return _rows(self.allowed, note=" (allowed)") + _rows(self.free)


def compare(
    before: dict[str, Any], now: dict[str, Any], samples: int, on_load: bool = False
) -> Changes:
    """Return the changes between the last launch of a run and this one.

    Args:
        before: Configuration of the last launch. A key that this version no longer has needs an
            override unless it was null.
        now: Configuration of this launch, whose `run.allow_changes` is the override.
        samples: Samples trained so far; stages that start later may change.
        on_load: Compare a new run with the run whose checkpoint it starts from. Only what
            determines the meaning of tensors and position must match. Everything else, data and
            seed included, is the new run's own and is reported as free.
    """
    changes = Changes()
    for key, both in differences(before, now).items():
        policy = policy_of(key) or REMOVED_KEY
        is_free = not policy.on_load if on_load else policy.change == "free"
        if key == "data.stages":
            is_free = is_free or _same_past(both, samples)
        elif key == "run.init_from":
            is_free = is_free or both[1] is None  # the run has its own weights by now
        elif _is_corpus_path(key, both, now):
            is_free = True  # the tokens are compared by their hash
        if is_free:
            changes.free[key] = both
        elif on_load or policy.change == "forbidden":
            changes.forbidden[key] = both
        elif _is_listed(key, now["run"]["allow_changes"]):
            changes.allowed[key] = both
        else:
            changes.unlisted[key] = both
    return changes


def check_changes(
    heading: str, before: dict[str, Any], now: dict[str, Any], samples: int, on_load: bool = False
) -> Changes:
    """Return the changes as `compare` does, if all are permitted.

    Raises:
        RunFolderError: Every change that is not permitted, with its remedy, below the heading.
    """
    changes = compare(before, now, samples, on_load)
    lines = []
    if changes.forbidden:
        rows = _rows(changes.forbidden, reasons=True)
        stages = _stage_remedy(changes, now, samples)
        if on_load:
            remedy = "Set these as in the run of the checkpoint, or use another checkpoint."
            lines += [*rows, remedy, *stages]
        else:
            lines += [
                "These keys cannot change within a run:",
                *rows,
                "Restore the old values to resume that run, or start a new run with another "
                "run.dir=…\n(it may start from a checkpoint of this one, also on other data: "
                "run.resume=CHECKPOINT).",
                *stages,
            ]
    if changes.unlisted:
        names = dict.fromkeys([*now["run"]["allow_changes"], *changes.unlisted])
        override = shlex.quote(f"run.allow_changes=[{','.join(names)}]")
        lines += [
            "These keys change only with an explicit override:",
            *_rows(changes.unlisted, reasons=True),
            f"Restore the old values, or add {override} to the command; the change is then "
            "recorded.",
        ]
    if not lines:
        return changes
    if not on_load and (rest := changes.rows()):
        lines += ["Also changed, which is permitted:", *rest]
    raise RunFolderError("\n".join([f"{heading} (key: there -> now).", *lines]))


def override_errors(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield errors for names in `run.allow_changes`.

    Names of free or unchanged keys are accepted: a requeued job repeats its command after the
    change has taken effect.
    """
    named_before = (before.get("run") or {}).get("allow_changes") or []
    known = [*_leaves(before), *_leaves(now), *named_before, REWINDS_FILE]
    for name in now["run"]["allow_changes"]:
        policy = policy_of(name)
        is_section = policy is not None and any(key.startswith(f"{name}.") for key in known)
        if policy is not None and policy.change == "forbidden":
            yield (
                f"run.allow_changes lists {name}, which cannot change within a run because it "
                f"determines {policy.decides}; remove it"
            )
        elif name not in known and not is_section:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "list keys like optim.weight_decay"
            yield f"run.allow_changes lists {name}, which is not a key; {remedy}"


def with_defaults(before: Any, now: Any) -> Any:
    """Return an older version's configuration with the keys added since at their defaults.

    A default reproduces the program before it had the key, so the run resumes unchanged.

    Args:
        before: The old configuration, or a part of it.
        now: The corresponding part of this version's, typed.
    """
    if dataclasses.is_dataclass(now) and isinstance(before, dict):
        filled = dict(before)
        for each in dataclasses.fields(now):
            if each.default is not dataclasses.MISSING:
                filled.setdefault(each.name, json.loads(json.dumps(each.default)))
            elif each.default_factory is not dataclasses.MISSING:
                filled.setdefault(each.name, each.default_factory())
            elif dataclasses.is_dataclass(getattr(now, each.name)):  # an entire section
                filled.setdefault(each.name, {})
        return {
            name: with_defaults(value, getattr(now, name, None)) for name, value in filled.items()
        }
    if isinstance(now, dict) and isinstance(before, dict):
        return {name: with_defaults(value, now.get(name)) for name, value in before.items()}
    if isinstance(now, list) and isinstance(before, list):
        return [with_defaults(one, of) for one, of in zip_longest(before, now[: len(before)])]
    return before


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, Difference]:
    """Return every leaf at which two nested dictionaries differ; a missing key counts as null."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix.removesuffix("."): [before, now]}
    found: dict[str, Difference] = {}
    for key in dict.fromkeys([*before, *now]):
        found |= differences(before.get(key), now.get(key), f"{prefix}{key}.")
    return found


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _is_listed(key: str, names: list[str]) -> bool:
    """Return whether `run.allow_changes` lists a key or a section that contains it."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _rows(changed: dict[str, Difference], note: str = "", reasons: bool = False) -> list[str]:
    rows = []
    for key, (before, now) in changed.items():
        reason = f" (determines {(policy_of(key) or REMOVED_KEY).decides})" if reasons else note
        rows.append(f"  {key}: {before!r} -> {now!r}{reason}")
    return rows


def _stage_remedy(changes: Changes, now: dict[str, Any], samples: int) -> list[str]:
    """Return how to change sizes and weights from the next sample on, if any were changed."""
    stage: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for key, (_, value) in changes.forbidden.items():
        if key in ("train.seq_len", "train.global_batch_size"):
            stage[key.removeprefix("train.")] = value
        elif source := re.fullmatch(r"data\.sources\.(.+)\.weight", key):
            weights[source[1]] = value
    if weights:
        stage["weights"] = weights
    if not stage:
        return []
    new = override_value({"from_sample": samples} | stage)
    start = f"To change sizes or weights from sample {samples} on, restore the old values and add"
    if now["data"]["stages"]:
        return [f"{start} {new} to data.stages."]
    return [f"{start} {shlex.quote(f'data.stages=[{new}]')}"]


def override_value(value: Any) -> str:
    """Return a value in the syntax of a Hydra override, not quoted for a shell."""
    text = json.dumps(value, default=dataclasses.asdict)
    return text.replace('"', "").replace(": ", ":").replace(", ", ",")


def _is_corpus_path(key: str, both: Difference, now: dict[str, Any]) -> bool:
    """Return whether a key is the path of local files, which may move and be spelled otherwise."""
    found = re.fullmatch(r"data\.sources\.(.+)\.path", key)
    source = now["data"]["sources"].get(found[1]) if found else None
    if not source or not all(isinstance(path, str) for path in both):
        return False
    if source["format"] == "huggingface":  # otherwise a name on the Hub, which is the identity
        return Path(source["path"]).is_dir()
    return source["format"] != "stdlib"


def _same_past(both: Difference, samples: int) -> bool:
    """Return whether two lists of stages agree on the first `samples` samples.

    `micro_batch_size` may differ, like `train.micro_batch_size`: it depends on the mesh. Values
    with a wrong type, in a `config.yaml` edited by hand, do not agree.
    """

    def past(stages: Any) -> list[dict[str, Any]]:
        begun = [stage for stage in stages or [] if stage.get("from_sample", -1) < samples]
        return [stage | {"micro_batch_size": None} for stage in begun]

    try:
        return past(both[0]) == past(both[1])
    except (AttributeError, TypeError):
        return False
