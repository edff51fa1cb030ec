"""The resume contract: what may change between two starts of a run, and on what terms.

One table puts each key of the configuration into one of three classes. A free key changes how the
run is computed; a key that asks changes what is computed, and is changed by consent
(`run.allow_changes`) and on record; a kept key would make the run another one. The most specific
pattern of the table decides. Compares plain dictionaries alone; imports nothing heavy.
"""

import difflib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """On what terms a key may change."""

    FREE = "free"
    ASKS = "asks"
    KEPT = "kept"


@dataclass(frozen=True)
class Clause:
    """One row of the contract.

    Args:
        kind: On what terms the keys may change.
        keys: Patterns, separated by spaces: a key and all below it, `*` for any one name.
        why: What the keys are or, unless they are free, what they decide.
        loads: Whether the keys also have to fit where a run begins with another's checkpoint.
    """

    kind: Kind
    keys: str
    why: str
    loads: bool = False


CONTRACT = (
    # How the run is computed, kept, watched and told: the samples and the function stay.
    Clause(Kind.FREE, "run.name run.dir run.resume", "where the run lies and goes on from"),
    Clause(Kind.FREE, "run.allow_changes run.time_limit run.plan_check", "terms of one start"),
    Clause(Kind.FREE, "model.name data.name", "a label"),
    Clause(Kind.FREE, "model.attention", "the kernel that computes the same attention"),
    Clause(Kind.FREE, "model.max_seq_len", "a bound on sequences, nothing is computed from it"),
    Clause(Kind.FREE, "parallel", "one run, any mesh"),
    Clause(Kind.FREE, "precision.optimizer_state", "the same moments, kept in more or fewer bits"),
    Clause(Kind.FREE, "train.micro_batch_size", "how a batch is cut"),
    Clause(Kind.FREE, "train.max_steps", "how far the run goes"),
    Clause(
        Kind.FREE,
        "optim.lr optim.schedule optim.schedule_steps optim.warmup_steps optim.min_lr_ratio "
        "optim.decay_ratio",
        "the learning rates to come",
    ),
    Clause(Kind.FREE, "data.folder tokenizer.path", "where the same tokens lie: they are compared"),
    Clause(
        Kind.FREE,
        "data.workers data.loader_threads data.prefetch data.verify_reads",
        "how fast and how carefully data are read",
    ),
    Clause(Kind.FREE, "checkpoint", "when is saved, and what is kept"),
    Clause(Kind.FREE, "faults watchdog", "what a fault to come leads to"),
    Clause(Kind.FREE, "validation log", "what is told on the way"),
    # What is computed, from now on.
    Clause(Kind.ASKS, "optim.betas optim.eps optim.weight_decay", "each update to come"),
    Clause(Kind.ASKS, "train.max_grad_norm", "each update that is clipped"),
    Clause(Kind.ASKS, "precision.param precision.reduce precision.fp8", "rounding"),
    Clause(
        Kind.ASKS,
        "model.rope_theta model.rope_scaling model.norm_eps",
        "the function of the same weights",
    ),
    Clause(Kind.ASKS, "data.document_mask", "which tokens see each other, and which are targets"),
    # What makes it this run.
    Clause(
        Kind.KEPT,
        "model.dim model.n_layers model.n_heads model.n_kv_heads model.ffn_dim model.vocab_size "
        "model.tie_embeddings",
        "what the weights are",
        loads=True,
    ),
    Clause(Kind.KEPT, "optim.optimizer", "what its moments mean", loads=True),
    Clause(Kind.KEPT, "run.seed", "the order of all samples"),
    Clause(Kind.KEPT, "run.init_from", "the weights that the run began from"),
    Clause(
        Kind.KEPT,
        "train.seq_len train.global_batch_size data.stages",
        "which samples the steps so far took",
        loads=True,
    ),
    Clause(Kind.KEPT, "data.sources.*.weight", "which samples the steps so far took"),
    Clause(
        Kind.KEPT,
        "data.packing data.shuffle_block_tokens data.stream_shards",
        "which tokens a sample is, and when it comes",
    ),
    Clause(
        Kind.KEPT,
        "data.sources data.validation_fraction data.shard_tokens data.invalid_text",
        "the tokens, and those held out",
    ),
    Clause(
        Kind.KEPT,
        "tokenizer.name tokenizer.vocab_size tokenizer.training_characters",
        "what a token is",
    ),
)
GONE = Clause(Kind.ASKS, "", "something that this version of the program has no key for")


def clause_of(key: str) -> Clause | None:
    """The clause whose pattern fits a dotted key most specifically; None where none does."""
    names = key.split(".")
    best, depth = None, 0
    for clause in CONTRACT:
        for pattern in clause.keys.split():
            wanted = pattern.split(".")
            fits = len(wanted) <= len(names) and all(
                one in ("*", name) for one, name in zip(wanted, names, strict=False)
            )
            if fits and len(wanted) > depth:
                best, depth = clause, len(wanted)
    return best


Difference = list[Any]  # [before, now], as the ledger holds it


@dataclass(frozen=True)
class Changes:
    """What a start's configuration changes, as `{key: [before, now]}` on each of the terms.

    `free` holds all that needs no consent, `allowed` what has it, `asking` what lacks it, and
    `kept` what no consent helps.
    """

    free: dict[str, Difference] = field(default_factory=dict)
    allowed: dict[str, Difference] = field(default_factory=dict)
    asking: dict[str, Difference] = field(default_factory=dict)
    kept: dict[str, Difference] = field(default_factory=dict)

    def rows(self) -> list[str]:
        """A line for each change that is made, for a person to see."""
        return _rows(self.allowed, note=" (allowed)") + _rows(self.free)


def compare(before: dict[str, Any], now: dict[str, Any], samples: int) -> Changes:
    """Which keys differ between the last start of a run and this one, and on what terms.

    Args:
        before: The configuration of the last start; a key that this version does not have any
            more asks, unless it was null.
        now: That of this start, whose `run.allow_changes` is the consent.
        samples: How many the run has taken: stages that begin later may change.
    """
    changes = Changes()
    for key, both in differences(before, now).items():
        clause = clause_of(key) or GONE
        if clause.kind is Kind.FREE or _without_effect(key, both, samples):
            changes.free[key] = both
        elif clause.kind is Kind.KEPT:
            changes.kept[key] = both
        elif _consented(key, now["run"]["allow_changes"]):
            changes.allowed[key] = both
        else:
            changes.asking[key] = both
    return changes


def _without_effect(key: str, both: Difference, samples: int) -> bool:
    """Whether a kept key changes in a way that leaves the run what it is."""
    if key == "run.init_from":
        return both[1] is None  # begun it has; the weights may be gone since
    return key == "data.stages" and _same_past(both[0], both[1], samples)


def compare_beginning(before: dict[str, Any], now: dict[str, Any], samples: int) -> Changes:
    """As `compare`, where a run begins with another's checkpoint: it has no past to contradict.

    Only what decides the meaning of the tensors and of the position has to fit. The rest, data and
    seed too, is the new run's own; all of it counts as free, for the record.
    """
    changes = Changes()
    for key, both in differences(before, now).items():
        clause = clause_of(key)
        fits = clause is None or not clause.loads
        fits = fits or (key == "data.stages" and _same_past(both[0], both[1], samples))
        (changes.free if fits else changes.kept)[key] = both
    return changes


def consent_errors(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is wrong with the names in `run.allow_changes`.

    A free key, or one that has not changed, does no harm there: a job that is requeued gives the
    same command again, after the change has been made.
    """
    named_before = (before.get("run") or {}).get("allow_changes") or []
    known = [*_leaves(before), *_leaves(now), *named_before]
    problems = []
    for name in now["run"]["allow_changes"]:
        clause = clause_of(name)
        if clause is not None and clause.kind is Kind.KEPT:
            problems.append(
                f"run.allow_changes names {name}, which no run changes, since it decides "
                f"{clause.why}: leave it out"
            )
        elif name not in known and not (
            clause and any(key.startswith(f"{name}.") for key in known)
        ):
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else "name keys, like optim.weight_decay"
            problems.append(f"run.allow_changes names {name}, which is not a key: {meant}")
    return problems


def refusal(changes: Changes, now: dict[str, Any], samples: int) -> str | None:
    """Every change that a run may not make, by class and with its remedy; None without one."""
    lines = []
    if changes.kept:
        lines += [
            "Never changed within a run:",
            *_rows(changes.kept, reasons=True),
            "Set these back to go on with that run, or give the new one a name of its own with "
            "run.name=…",
            "(which may begin with a checkpoint of this one, on other data too: "
            "run.resume=CHECKPOINT).",
            *_stage_remedy(changes.kept, now, samples),
        ]
    if changes.asking:
        names = dict.fromkeys([*now["run"]["allow_changes"], *changes.asking])
        consent = shlex.quote(f"run.allow_changes=[{','.join(names)}]")
        lines += [
            "Changed only by consent:",
            *_rows(changes.asking, reasons=True),
            f"Set these back, or add {consent} to the command; the change is recorded then.",
        ]
    if lines and (rest := changes.rows()):
        lines += ["Changed too, as they may be:", *rest]
    return "\n".join(lines) or None


def beginning_refusal(changes: Changes, now: dict[str, Any], samples: int) -> str | None:
    """What keeps a run from beginning with another's checkpoint; None where nothing does."""
    if not changes.kept:
        return None
    return "\n".join(
        [
            *_rows(changes.kept, reasons=True),
            "Set these as they are there, or use another checkpoint.",
            *_stage_remedy(changes.kept, now, samples),
        ]
    )


def differences(before: Any, now: Any, prefix: str = "") -> dict[str, Difference]:
    """Every leaf at which two nested dictionaries differ; a key that one lacks is null there."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix.removesuffix("."): [before, now]}
    found: dict[str, Difference] = {}
    for key in dict.fromkeys([*before, *now]):
        found |= differences(before.get(key), now.get(key), f"{prefix}{key}.")
    return found


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _consented(key: str, names: list[str]) -> bool:
    """Whether a key, or what it is a part of, is among those allowed to change."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _rows(changed: dict[str, Difference], note: str = "", reasons: bool = False) -> list[str]:
    """`key: before -> now`, a line each, and for what cannot simply change the reason."""
    rows = []
    for key, (before, now) in changed.items():
        reason = f" (decides {(clause_of(key) or GONE).why})" if reasons else note
        rows.append(f"  {key}: {before!r} -> {now!r}{reason}")
    return rows


def _stage_remedy(kept: dict[str, Difference], now: dict[str, Any], samples: int) -> list[str]:
    """How to bring sizes and weights about from the next sample on, where some were changed."""
    entry: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for key, (_, value) in kept.items():
        names = key.split(".")
        if key in ("train.seq_len", "train.global_batch_size"):
            entry[names[-1]] = value
        elif names[:2] == ["data", "sources"] and names[3:] == ["weight"]:
            weights[names[2]] = value
    if weights:
        entry["weights"] = weights
    if not entry:
        return []
    new = _typed({"from_sample": samples} | entry)
    begin = f"Sizes and weights may change from sample {samples} on: set them back, and add"
    if now["data"]["stages"]:
        return [f"{begin} {new} to data.stages."]
    return [f"{begin} {shlex.quote(f'data.stages=[{new}]')}"]


def _typed(value: Any) -> str:
    """A value as a person types it in an override."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_typed(one)}" for key, one in value.items()) + "}"
    return str(value)


def _same_past(before: Any, now: Any, samples: int) -> bool:
    """Whether two lists of stages give the same first `samples` samples: the rest is to come.

    `micro_batch_size` is as free as that of `train`: another mesh may need another one.
    """

    def is_past(stage: Any) -> bool:
        begin = stage.get("from_sample") if isinstance(stage, dict) else None
        return not isinstance(begin, int) or begin < samples

    def past(stages: Any) -> list[Any]:
        return [
            stage | {"micro_batch_size": None} if isinstance(stage, dict) else stage
            for stage in (stages if isinstance(stages, list) else [])
            if is_past(stage)
        ]

    return past(before) == past(now)
