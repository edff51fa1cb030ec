"""Which keys may change when a run resumes: free, with an explicit override, or never.

The policy of a key is declared on its field (`model.config_base.ResumePolicy`); a policy on a
section applies to all keys below that do not declare their own. This module compares the
configurations of two launches and formats the errors. Imports nothing heavy.
"""

import dataclasses
import difflib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Annotated, Any, get_args, get_origin

from model.config_base import ResumePolicy
from training.config import JobConfig
from training.config_validation import annotations_along

REMOVED_KEY = ResumePolicy("override", "a setting that this version does not have")


def policy_of(key: str) -> ResumePolicy | None:
    """Return the policy declared closest to a dotted key, or None."""
    found = None
    for annotation in annotations_along(JobConfig, key.split(".")):
        if get_origin(annotation) is Annotated:
            policies = [each for each in get_args(annotation) if isinstance(each, ResumePolicy)]
            found = policies[-1] if policies else found
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


def compare(before: dict[str, Any], now: dict[str, Any], samples: int) -> Changes:
    """Return the changes between the last launch of a run and this one.

    Args:
        before: Configuration of the last launch. A key that this version no longer has needs an
            override unless it was null.
        now: Configuration of this launch, whose `run.allow_changes` is the override.
        samples: Samples trained so far; stages that start later may change.
    """
    changes = Changes()
    for key, both in differences(before, now).items():
        policy = policy_of(key) or REMOVED_KEY
        if policy.change == "free" or _has_no_effect(key, both, samples):
            changes.free[key] = both
        elif policy.change == "forbidden":
            changes.forbidden[key] = both
        elif _is_listed(key, now["run"]["allow_changes"]):
            changes.allowed[key] = both
        else:
            changes.unlisted[key] = both
    return changes


def _has_no_effect(key: str, both: Difference, samples: int) -> bool:
    """Return whether a change of a restricted key leaves the run the same."""
    if key == "run.init_from":
        return both[1] is None  # the run has its own weights by now
    return key == "data.stages" and _same_past(both[0], both[1], samples)


def compare_on_load(before: dict[str, Any], now: dict[str, Any], samples: int) -> Changes:
    """Return the changes for a new run that starts from another run's checkpoint.

    Only what determines the meaning of tensors and position must match. Everything else, data and
    seed included, is the new run's own and is reported as free.
    """
    changes = Changes()
    for key, both in differences(before, now).items():
        policy = policy_of(key)
        fits = policy is None or not policy.on_load
        fits = fits or (key == "data.stages" and _same_past(both[0], both[1], samples))
        (changes.free if fits else changes.forbidden)[key] = both
    return changes


def override_errors(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return errors for names in `run.allow_changes`.

    Names of free or unchanged keys are accepted: a requeued job repeats its command after the
    change has taken effect.
    """
    named_before = (before.get("run") or {}).get("allow_changes") or []
    known = [*_leaves(before), *_leaves(now), *named_before]
    errors = []
    for name in now["run"]["allow_changes"]:
        policy = policy_of(name)
        if policy is not None and policy.change == "forbidden":
            errors.append(
                f"run.allow_changes lists {name}, which cannot change within a run because it "
                f"determines {policy.decides}; remove it"
            )
        elif name not in known and not (
            policy and any(key.startswith(f"{name}.") for key in known)
        ):
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "list keys like optim.weight_decay"
            errors.append(f"run.allow_changes lists {name}, which is not a key; {remedy}")
    return errors


def changes_error(changes: Changes, now: dict[str, Any], samples: int) -> str | None:
    """Return a message with every change that is not permitted and its remedy, or None."""
    lines = []
    if changes.forbidden:
        lines += [
            "These keys cannot change within a run:",
            *_rows(changes.forbidden, reasons=True),
            "Restore the old values to resume that run, or start a new run with another run.name=…",
            "(it may start from a checkpoint of this one, also on other data: "
            "run.resume=CHECKPOINT).",
            *_stage_remedy(changes.forbidden, now, samples),
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
    if lines and (rest := changes.rows()):
        lines += ["Also changed, which is permitted:", *rest]
    return "\n".join(lines) or None


def load_error(changes: Changes, now: dict[str, Any], samples: int) -> str | None:
    """Return a message for a checkpoint of another run that does not fit, or None."""
    if not changes.forbidden:
        return None
    return "\n".join(
        [
            *_rows(changes.forbidden, reasons=True),
            "Set these as in the run of the checkpoint, or use another checkpoint.",
            *_stage_remedy(changes.forbidden, now, samples),
        ]
    )


def with_defaults(before: Any, now: Any) -> Any:
    """Return an older version's configuration with the keys added since at their defaults.

    A default reproduces the program before it had the key, so the run resumes unchanged.

    Args:
        before: The old configuration, or a part of it.
        now: The corresponding part of this version's, typed.
    """
    if dataclasses.is_dataclass(now) and isinstance(before, dict):
        filled = {
            name: with_defaults(value, getattr(now, name, None)) for name, value in before.items()
        }
        for each in dataclasses.fields(now):
            if each.name in before:
                continue
            if each.default is not dataclasses.MISSING:
                filled[each.name] = json.loads(json.dumps(each.default))
            elif each.default_factory is not dataclasses.MISSING:
                filled[each.name] = json.loads(json.dumps(each.default_factory()))
            elif dataclasses.is_dataclass(getattr(now, each.name)):  # an entire section
                filled[each.name] = with_defaults({}, getattr(now, each.name))
        return filled
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


def _stage_remedy(forbidden: dict[str, Difference], now: dict[str, Any], samples: int) -> list[str]:
    """Return how to change sizes and weights from the next sample on, if any were changed."""
    stage: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for key, (_, value) in forbidden.items():
        names = key.split(".")
        if key in ("train.seq_len", "train.global_batch_size"):
            stage[names[-1]] = value
        elif names[:2] == ["data", "sources"] and names[3:] == ["weight"]:
            weights[names[2]] = value
    if weights:
        stage["weights"] = weights
    if not stage:
        return []
    new = _override_value({"from_sample": samples} | stage)
    start = f"To change sizes or weights from sample {samples} on, restore the old values and add"
    if now["data"]["stages"]:
        return [f"{start} {new} to data.stages."]
    return [f"{start} {shlex.quote(f'data.stages=[{new}]')}"]


def _override_value(value: Any) -> str:
    """Return a value in the syntax of a Hydra override."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_override_value(one)}" for key, one in value.items()) + "}"
    return str(value)


def _same_past(before: Any, now: Any, samples: int) -> bool:
    """Return whether two lists of stages agree on the first `samples` samples.

    `micro_batch_size` may differ, like `train.micro_batch_size`: it depends on the mesh.
    """

    def is_past(stage: Any) -> bool:
        start = stage.get("from_sample") if isinstance(stage, dict) else None
        return not isinstance(start, int) or start < samples

    def past(stages: Any) -> list[Any]:
        return [
            stage | {"micro_batch_size": None} if isinstance(stage, dict) else stage
            for stage in (stages if isinstance(stages, list) else [])
            if is_past(stage)
        ]

    return past(before) == past(now)
