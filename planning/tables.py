"""A plan and a search as tables for a person, the answer last; how they look is the console's."""

from collections.abc import Sequence

from parallel.mesh import AXES
from planning.config import PlanJobConfig
from planning.plan import DAY, GIB, PARTS, Plan, RunPlan, step_parts
from planning.search import SearchResult
from training.console import Console, compact


def print_plan(console: Console, config: PlanJobConfig, plan: RunPlan) -> None:
    """Everything about a plan, the answer last."""
    first, job = plan.stages[0], plan.stages[0].job
    names = stage_names(plan)
    console.header(
        f"Plan: {config.model.name} on {job.mesh.world_size} × {config.hardware.name}",
        [
            ("mesh", f"{job.mesh}"),
            *(
                (name or "batch", _batch(stage))
                for name, stage in zip(names, plan.stages, strict=True)
            ),
            ("precision", _precision(first)),
            ("recomputed", str(job.parallel.activation_checkpoint)),
        ],
    )
    held = [
        (" ".join([*name.split(), tier]), memory, stage.capacity)
        for name, stage in zip(names, plan.stages, strict=True)
        for tier, memory in stage.tiers.items()
    ]
    unit, size = _unit(max(memory.peak for _, memory, _ in held))
    console.table(
        f"Memory of a rank at its fullest, {unit}",
        ["", *(name for name, _, _ in held)],
        [
            *(
                [part, *(f"{getattr(memory, part) / size:,.2f}" for _, memory, _ in held)]
                for part in PARTS
            ),
            ["peak", *(f"{memory.peak / size:,.2f}" for _, memory, _ in held)],
            ["of", *(f"{room / size:,.2f}" for _, _, room in held)],
            ["in", *(memory.moment for _, memory, _ in held)],
        ],
    )
    full = plan.fullest
    links = full.links()
    if full.traffic:
        unit, size = _unit(max(sent for *_, sent in full.by_axis()))
        console.table(
            "Sent by a rank in a step",
            ["axis", "link", "what", "for", "times", unit],
            [
                [axis, links[axis], kind, part, f"{count:,}", f"{sent / size:,.3f}"]
                for axis, kind, part, count, sent in full.by_axis()
            ],
        )
    for name, stage in zip(names, plan.stages, strict=True):
        console.table(
            f"A step{name and ' of '}{name}",
            ["", "seconds", "share"],
            [
                [what, f"{seconds:.4f}", f"{seconds / stage.time.total:.1%}"]
                for what, seconds in step_parts(stage).items()
            ],
        )
    console.header("Answer", _answer_rows(config, plan))


def _batch(plan: Plan) -> str:
    """The batch of a stage, and how a rank takes it."""
    job = plan.job
    return (
        f"{job.global_batch_size} sequences of {job.seq_len} tokens a step; a data rank takes "
        f"{job.micro_batches} × {job.micro_batch_size} of them"
    )


def _answer_rows(config: PlanJobConfig, plan: RunPlan) -> list[tuple[str, str]]:
    """The figures that decide."""
    full, first = plan.fullest, plan.stages[0]
    share = f"{gib(full.memory.peak)} of {gib(full.capacity)} GiB"
    rows = [
        ("fits", f"yes, {share}" if plan.fits else f"no, {share}"),
        ("limited by", full.limit if not plan.fits else first.limit),
        ("tokens/s", f"{plan.tokens_per_second:,.0f}"),
        ("a device", f"{first.tokens_per_second_per_device:,.0f} tokens/s"),
        ("", f"{first.tflops():.3g} TFLOP/s{_mfu(first)}"),
        ("tokens", f"{compact(plan.tokens)}, {_budget(config)}"),
    ]
    if plan.days is not None:
        rows.append(("time", _long(plan.days)))
    if plan.cost is not None:
        price = f"{config.hardware.price_per_hour:g} an hour and device"
        rows.append(("cost", f"{plan.cost:,.0f}, at {price}"))
    return rows


def print_search(
    console: Console, config: PlanJobConfig, found: SearchResult, commands: Sequence[str]
) -> None:
    """The best choices with their words, and why the others are not among them."""
    console.header(
        f"Search: {config.model.name} on {config.n_devices} × {config.hardware.name}",
        [
            ("planned", f"{found.candidates:,} choices"),
            ("fitting", f"{found.fitting:,}"),
        ],
    )
    if found.best:
        console.table(
            f"The best {len(found.best)}",
            ["", *AXES, "micro-batch", "recomputed", "resharded", "reduced", "GiB", "tokens/s"],
            [
                [
                    str(place),
                    *map(str, choice.mesh.sizes),
                    str(choice.micro_batch_size),
                    str(choice.activation_checkpoint),
                    choice.reshard,
                    choice.reduce_gradients,
                    gib(plan.fullest.memory.peak),
                    f"{plan.tokens_per_second:,.0f}",
                ]
                for place, (choice, plan) in enumerate(found.best, start=1)
            ],
        )
        console.summary(
            "To train with one of them:",
            [],
            [(str(place), command) for place, command in enumerate(commands, start=1)],
        )
        console.note("")
    if found.reasons:
        ordered = sorted(found.reasons.items(), key=lambda item: -item[1].count)
        rows = [(f"{one.count:,}", f"{why}; for example {one.example}") for why, one in ordered]
        console.header("Why not the others", rows)


def _precision(plan: Plan) -> str:
    """The number formats of a job."""
    precision = plan.job.precision
    fp8 = f", products in fp8 ({precision.fp8})" if precision.fp8 else ""
    return (
        f"{precision.param}{fp8}, gradients summed in {precision.reduce}, moments in "
        f"{precision.optimizer_state}"
    )


def stage_names(plan: RunPlan) -> list[str]:
    """What a stage is called: nothing where there is one."""
    if len(plan.stages) == 1:
        return [""]
    return [f"stage {place}" for place in range(1, len(plan.stages) + 1)]


def _mfu(plan: Plan) -> str:
    """Both conventions, where there is a peak to measure by."""
    causal, full = plan.mfu(), plan.mfu(causal=False)
    if causal is None or full is None:
        return ""
    return f", MFU {causal:.1%} causal, {full:.1%} full"


def _budget(config: PlanJobConfig) -> str:
    """Where the number of tokens comes from."""
    if config.tokens is not None:
        return "as asked for"
    return f"those of train.max_steps ({config.train.max_steps})"


def _long(days: float) -> str:
    """Days, or what is more telling where they are few."""
    if days >= 2:
        return f"{days:,.1f} days"
    hours = days * 24
    return f"{hours:.1f} hours" if hours >= 2 else f"{days * DAY:.1f} seconds"


def _unit(largest: float) -> tuple[str, int]:
    """GiB, or MiB where there is less than one, and its bytes."""
    return ("GiB", GIB) if largest >= GIB else ("MiB", 2**20)


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"
