"""Training steps on fake CUDA tensors: every two options together; eager here.

Each case is one rank of a mesh and runs two steps. The checks that hold for every case are in
`step.check_steps`; here are those that depend on its options.
"""

from dataclasses import replace
from typing import Any

import pytest
from covering import covering_set
from fake_device import on_fake_device
from step import MODEL, Case, Report, run_cases

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.pipeline_schedule import parts_of_rank
from planning.step_spec import StepSpec, resolved_precision

# dp_replicate, dp_shard, cp, tp, pp; and the rank. Neither 3 nor 6 divides the widths.
MESHES = (
    *(((1, 1, 1, 1), 0), ((1, 2, 1, 1), 1), ((1, 3, 1, 1), 2), ((2, 1, 1, 1), 1)),
    *(((1, 1, 2, 1), 1), ((1, 1, 1, 2), 1), ((2, 2, 1, 1), 3), ((1, 3, 1, 2), 5)),
    *(((1, 2, 2, 1), 2), ((1, 1, 2, 2), 3), ((2, 1, 1, 2), 1), ((2, 2, 2, 2), 13)),
    *(((1, 1, 1, 1, 2), 0), ((1, 1, 1, 1, 3), 1), ((1, 3, 1, 1, 2), 5), ((2, 1, 1, 1, 2), 1)),
    *(((1, 1, 2, 1, 2), 3), ((1, 1, 1, 2, 2), 2), ((2, 2, 1, 2, 2), 5)),
)
PRECISIONS = ("fp32", "bf16", "tensorwise", "rowwise")
OPTIONS: dict[str, Any] = {
    "mesh": MESHES,
    "precision": PRECISIONS,
    "activation_checkpoint": ("none", "selective", "full"),
    "attention": ("auto", "flex", "sdpa", "varlen"),
    "documents": (5, None),
    "optimizer_state": ("fp32", "bf16", "int8"),
    "micro_batches": (1, 2),
    "reduce_gradients": ("step", "micro_batch"),
    "sequence_parallel": (True, False),
    "loss_parallel": (True, False),
    "reshard_after_forward": (None, True, False),
    "reduce": ("auto", "bf16"),
    "tie_embeddings": (False, True),
    "capability": ((9, 0), (8, 0), (8, 9), (12, 0), (7, 5)),
}
COMPILED_OPTIONS = {
    **{name: OPTIONS[name] for name in ("precision", "attention", "documents", "tie_embeddings")},
    "mesh": tuple(MESHES[index] for index in (0, 4, 5, 7, 11, 13, 14, 17)),
    "activation_checkpoint": ("none", "selective", "full", 0.5),
    "optimizer_state": ("fp32", "int8"),
    "micro_batches": (1, 2),
    "sequence_parallel": (True, False),
    "loss_parallel": (True, False),
    "capability": ((9, 0), (8, 0)),
}
GROUP = {False: 8, True: 4}  # cases in one process, eager and compiled


def is_valid(choice: dict[str, Any]) -> bool:
    """Return whether the rules of the configuration allow a choice."""
    capability, precision = choice["capability"], choice["precision"]
    lowest = {"fp32": (7, 5), "bf16": (8, 0), "tensorwise": (8, 9), "rowwise": (9, 0)}[precision]
    varlen = choice["attention"] == "varlen"
    return capability >= lowest and not (
        varlen and (precision == "fp32" or choice["mesh"][0][2] > 1 or capability < (8, 0))
    )


def make_case(choice: dict[str, Any], compiled: bool) -> Case:
    mesh, rank = choice["mesh"]
    fields = ParallelConfig.__dataclass_fields__
    parallel: Any = {name: value for name, value in choice.items() if name in fields}
    precision = choice["precision"]
    scaled = precision in ("tensorwise", "rowwise")
    return Case(
        mesh=mesh,
        rank=rank,
        model=replace(
            MODEL, attention=choice["attention"], tie_embeddings=choice["tie_embeddings"]
        ),
        parallel=ParallelConfig(**parallel, compile=compiled),
        precision=PrecisionConfig(
            param="bf16" if scaled else precision,
            fp8=precision if scaled else None,
            optimizer_state=choice["optimizer_state"],
            reduce=choice.get("reduce", "auto"),
        ),
        documents=choice["documents"],
        micro_batches=choice["micro_batches"],
    )


def cases(compiled: bool) -> dict[str, dict[str, Any]]:
    """Return the choices of a covering set by their description."""
    options = COMPILED_OPTIONS if compiled else OPTIONS
    choices = covering_set(options, is_valid)
    return {f"{i}: " + ", ".join(map(str, each.values())): each for i, each in enumerate(choices)}


def groups(compiled: bool) -> list[Any]:
    """Return the choices in groups of one GPU; all but the first eager group are `slow`."""
    by_capability: dict[Any, dict[str, Any]] = {}
    for name, choice in cases(compiled).items():
        by_capability.setdefault(choice["capability"], {})[name] = choice
    found = []
    for each in by_capability.values():
        names = list(each)
        size = GROUP[compiled]
        found += [{n: each[n] for n in names[i : i + size]} for i in range(0, len(names), size)]
    return [
        pytest.param(group, marks=[pytest.mark.slow] if i or compiled else [], id=str(i))
        for i, group in enumerate(found)
    ]


@pytest.mark.parametrize("choices", groups(compiled=False))
def test_eager_steps(choices: dict[str, Any]) -> None:
    check(choices, compiled=False)


def check(choices: dict[str, Any], compiled: bool) -> None:
    (capability,) = {choice["capability"] for choice in choices.values()}
    of_choice = {name: make_case(choice, compiled) for name, choice in choices.items()}
    reports = on_fake_device(run_cases, of_choice, capability=capability)
    failed = {name: report for name, report in reports.items() if isinstance(report, str)}
    assert not failed, "\n\n".join(f"{name}\n{error}" for name, error in failed.items())
    for name, report in reports.items():
        assert not report.sdpa.get("math"), name
        check_report(name, of_choice[name], choices[name], report)


def check_report(name: str, case: Case, choice: dict[str, Any], report: Report) -> None:
    """Check kernels, recomputation and compiled graphs of one case."""
    mesh = MeshShape(*case.mesh)
    parts = parts_of_rank(case.model, case.parallel, mesh.pp, mesh.stage(case.rank))
    layers, has_head = sum(len(part.layers) for part in parts), parts[-1].has_head
    forwards = layers * case.micro_batches
    kernel = expected_kernel(choice)
    calls = {each: report.operations[each] for each in KERNELS if report.operations[each]}
    full = choice["activation_checkpoint"] == "full"
    recomputed = full or choice["activation_checkpoint"] == 0.5
    if case.parallel.compile and recomputed:  # the partitioner decides
        assert calls.keys() == {kernel} and forwards <= calls[kernel] <= 2 * forwards, name
    else:
        assert calls == ({kernel: forwards * (2 if full else 1)} if layers else {}), name
    if not case.parallel.compile:
        # Of seven products a block, `full` repeats all but the last, and in fp8, where a layer's
        # tensors are saved after its product, all; the head has two and addmm.
        repeated = (7 if case.precision.fp8 else 6) if full else 0
        products = layers * (21 + repeated) + 2 * has_head
        found = report.operations["mm"] + report.operations["_scaled_mm"]
        assert found == products * case.micro_batches, name
        if case.precision.fp8:
            assert report.operations["mm"] == 2 * has_head * case.micro_batches, name
    assert report.gathered == planned_gathers(case, choice["capability"]), name
    assert report.first_graphs == report.graphs, name  # no compilation after the first step
    assert report.graphs <= MAX_GRAPHS, name


_SDPA = ("flash", "efficient", "cudnn")
KERNELS = ("_varlen_attn", "flex_attention", *map("_scaled_dot_product_{}_attention".format, _SDPA))
# A block, two stages of the loss, two of a low-bit moment in two shapes, and flex in eager mode.
MAX_GRAPHS = 8


def planned_gathers(case: Case, capability: tuple[int, int]) -> int:
    """Return the bytes of weights that the planner counts in a step's all-gathers."""
    mesh = MeshShape(*case.mesh)
    spec = StepSpec(
        model=case.model,
        mesh=mesh,
        parallel=case.parallel,
        precision=resolved_precision(case.precision, "cuda", capability),
        accelerator="cuda",
        seq_len=case.seq,
        global_batch_size=case.micro_batches * case.batch * mesh.dp,
        micro_batch_size=case.batch,
        stage=mesh.stage(case.rank),
    )
    gathers = (each for each in spec.traffic() if each.kind == "all_gather")
    return sum(each.payload for each in gathers if each.part == "weights" and each.axis != "tp")


def expected_kernel(choice: dict[str, Any]) -> str:
    """Return the attention operation of a choice."""
    attention, cp = choice["attention"], choice["mesh"][0][2]
    sixteen_bit, documents = choice["precision"] != "fp32", choice["documents"] is not None
    if not documents and cp == 1:
        attention = "sdpa"
    elif attention == "auto" and choice["capability"] < (8, 0):
        attention = "sdpa"  # Triton's templates need more shared memory than sm_75 has
    elif attention == "auto":
        attention = "varlen" if sixteen_bit and cp == 1 else "flex"
    if attention == "flex":
        return "flex_attention"
    if attention == "varlen":
        return "_varlen_attn"
    if not sixteen_bit:
        backend = "efficient"
    elif choice["capability"] == (9, 0):
        backend = "cudnn"
    else:
        backend = "efficient" if documents or cp > 1 else "flash"
    return f"_scaled_dot_product_{backend}_attention"
