"""Closed forms of a pipeline rank's memory against its traced step.

The tolerance of 3% is that of `test_planning_memory`: it covers small buffers of a single phase.
"""

from dataclasses import replace
from typing import Any

import pytest

from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning import pipeline_step, tracing
from planning.host import copied_bytes, host_bytes, shard_bytes
from planning.memory import different_stages, stage_memory, step_memory, step_peaks
from planning.phases import blocks_in_flight
from planning.step_spec import StepSpec
from planning.tracing import trace_memory, trace_stage_memory

TOLERANCE = 0.03
MODEL = ModelConfig("small", 64, 4, 8, 4, 176, 1024)
MODEL_KEYS = ("n_layers", "vocab_size", "tie_embeddings", "attention")
AXES = ("dp_replicate", "dp_shard", "cp", "tp")
PARALLEL = {*ParallelConfig.__dataclass_fields__} - {*AXES}

LARGE_VOCABULARY = {"vocab_size": 32_768, "seq_len": 32, "n_layers": 3}
INTERLEAVED = {"pp_parts": 2, "n_layers": 4, "micro_batches": 4}
EACH_REDUCED = {"reduce_gradients": "micro_batch"}
REPLICATED = {"dp_replicate": 2, "reduce": "bf16"}
SELECTIVE = {"activation_checkpoint": "selective"}

# accelerator, pp, other settings
GRID: list[tuple[str, int, dict[str, Any]]] = [
    ("cpu", 2, {}),
    ("cpu", 2, {"tp": 2, "param": "bf16", "tie_embeddings": True}),
    ("cpu", 3, {"dp_shard": 2, "param": "bf16", "activation_checkpoint": "full"}),
    ("cpu", 2, INTERLEAVED),
    ("cpu", 2, {**INTERLEAVED, **LARGE_VOCABULARY, **REPLICATED, "param": "bf16"}),
    ("cpu", 2, {**INTERLEAVED, **LARGE_VOCABULARY, **EACH_REDUCED, "dp_shard": 2}),
    ("cpu", 2, {"pp_layers": (3, 0), "n_layers": 3, "param": "bf16", "tp": 2}),
    ("cuda", 2, {"dp_shard": 2, "cp": 2, "activation_checkpoint": "selective"}),
    ("cuda", 3, {"pp_layers": (1, 3, 1), "n_layers": 5, "compile": True, "micro_batches": 2}),
    ("cuda", 2, {**LARGE_VOCABULARY, "dp_shard": 2, "reshard_after_forward": True}),
    ("cuda", 16, {"n_layers": 16, "micro_batches": 32, "activation_checkpoint": "full"}),
]
WIDE_GRID: list[tuple[str, int, dict[str, Any]]] = [
    ("cpu", 2, {"micro_batches": 1, "dp_shard": 2}),
    ("cpu", 3, {"micro_batches": 1, "param": "bf16"}),
    ("cpu", 4, {"micro_batches": 3, "tp": 2, "activation_checkpoint": "full"}),
    ("cpu", 4, {"tp": 2, "sequence_parallel": False, "param": "bf16", "tie_embeddings": True}),
    ("cpu", 4, {**LARGE_VOCABULARY, **EACH_REDUCED, **REPLICATED, "dp_shard": 2}),
    ("cpu", 2, {**LARGE_VOCABULARY, "tie_embeddings": True, "optimizer_state": "int8"}),
    ("cpu", 3, {**INTERLEAVED, "n_layers": 12, "micro_batches": 6, "cp": 2}),
    ("cpu", 2, {**INTERLEAVED, **LARGE_VOCABULARY, **EACH_REDUCED, **REPLICATED}),
    ("cpu", 2, {"pp_parts": 3, "n_layers": 13, "micro_batches": 4, **SELECTIVE}),
    ("cpu", 2, {"pp_layers": (1, 11), "n_layers": 12}),
    ("cpu", 2, {"pp_layers": (3, 0), "n_layers": 3}),
    ("cpu", 3, {"n_layers": 30, "activation_checkpoint": "full", "dp_shard": 2}),
    ("cuda", 4, {**INTERLEAVED, "n_layers": 8, "micro_batches": 16, "compile": True}),
    ("cuda", 4, {"n_layers": 24, "micro_batches": 9, "dp_shard": 8, "tp": 2}),
    ("cuda", 16, {"n_layers": 62, "micro_batches": 32, "dp_shard": 2}),
    ("cuda", 16, {"n_layers": 30, "micro_batches": 8, "tp": 4, "cp": 2}),
    ("cuda", 3, {"dp_replicate": 2, "dp_shard": 2, **EACH_REDUCED, "reshard_after_forward": True}),
    ("cuda", 2, {**INTERLEAVED, "dp_shard": 4, "reshard_after_forward": True}),
    ("cuda", 2, {"activation_checkpoint": "selective", "compile": True, "tp": 2}),
    ("cuda", 3, {"activation_checkpoint": 0.7, "compile": True}),
    ("cuda", 3, {"activation_checkpoint": 0.3, "compile": True}),
]


def make_spec(accelerator: str, pp: int, settings: dict[str, Any]) -> StepSpec:
    mesh = MeshShape(*[*(settings.get(axis, 1) for axis in AXES), pp])
    keys = settings.keys() & PARALLEL
    param = settings.get("param", "bf16" if accelerator == "cuda" else "fp32")
    state = settings.get("optimizer_state", "fp32")
    return StepSpec(
        model=replace(MODEL, **{key: settings[key] for key in MODEL_KEYS if key in settings}),
        mesh=mesh,
        parallel=ParallelConfig(**{"pp": pp, "compile": False} | {k: settings[k] for k in keys}),
        precision=PrecisionConfig(param, settings.get("reduce", "fp32"), state),
        accelerator="cuda" if accelerator == "cuda" else "cpu",
        seq_len=settings.get("seq_len", 256),
        global_batch_size=2 * mesh.dp * settings.get("micro_batches", 3),
        micro_batch_size=2,
    )


def check_stages(spec: StepSpec) -> None:
    for stage in different_stages(spec):
        traced, analytic = trace_stage_memory(stage), stage_memory(stage)
        assert analytic.peak == pytest.approx(traced.peak, rel=TOLERANCE), stage.stage
        assert analytic.parameters == traced.parameters
        assert analytic.optimizer == pytest.approx(traced.optimizer, rel=1e-3)  # blocks of 256


@pytest.mark.parametrize(("accelerator", "pp", "settings"), GRID)
def test_closed_form_of_each_stage_matches_traced_step(
    accelerator: str, pp: int, settings: dict[str, Any]
) -> None:
    check_stages(make_spec(accelerator, pp, settings))


@pytest.mark.slow
@pytest.mark.parametrize(("accelerator", "pp", "settings"), WIDE_GRID)
def test_closed_form_of_each_stage_matches_traced_step_in_wide_grid(
    accelerator: str, pp: int, settings: dict[str, Any]
) -> None:
    check_stages(make_spec(accelerator, pp, settings))


def test_step_memory_is_that_of_fullest_stage() -> None:
    """In both tiers. The first rank has the most micro-batches in flight, the last one the head."""
    deep = make_spec("cpu", 3, {"n_layers": 3, "pp_layers": (1, 1, 1)})
    wide = make_spec("cpu", 3, {**LARGE_VOCABULARY, "seq_len": 16})
    for spec, fullest in ((deep, 0), (wide, 2)):
        stages = [stage_memory(stage) for stage in spec.stages]
        assert step_memory(spec) == max(stages, key=lambda memory: memory.peak) == stages[fullest]
        assert trace_memory(spec).stage == step_memory(spec).stage == fullest


@pytest.mark.parametrize("settings", [{"n_layers": 40}, {**INTERLEAVED, "n_layers": 40}])
@pytest.mark.parametrize("micro_batches", [8, 40])
def test_no_stage_needs_more_than_the_different_ones(
    settings: dict[str, Any], micro_batches: int
) -> None:
    spec = make_spec("cpu", 8, settings | {"micro_batches": micro_batches})
    different = different_stages(spec)
    assert len(different) < len(spec.stages)
    assert step_memory(spec).peak == max(stage_memory(stage).peak for stage in spec.stages)


@pytest.mark.parametrize(("accelerator", "pp", "settings"), GRID)
def test_replayed_micro_batches_reach_the_peak_of_many(
    accelerator: str, pp: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(accelerator, pp, settings | {"micro_batches": 8 * pp})
    few = [step_peaks(stage) for stage in spec.stages]
    monkeypatch.setattr(pipeline_step, "replayed_micro_batches", lambda stage: stage.micro_batches)
    for stage, peaks in zip(spec.stages, few, strict=True):
        assert peaks == step_peaks(stage)


@pytest.mark.slow
def test_stages_of_deep_pipeline_extrapolate_from_two_depths_and_numbers_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec("cpu", 7, {"pp_layers": (1, 6, *[1] * 5), "n_layers": 12, "seq_len": 32})
    stage = replace(spec, stage=1, global_batch_size=16)
    extrapolated = trace_stage_memory(stage)
    monkeypatch.setattr(tracing, "DEPTHS", (4, 6))
    monkeypatch.setattr(tracing, "IN_FLIGHT", (3, 6))
    assert trace_stage_memory(stage).peak == pytest.approx(extrapolated.peak, rel=1e-3)


def test_first_stage_saves_activations_of_all_micro_batches_in_flight() -> None:
    spec = make_spec("cuda", 4, {"pp_layers": (2, 2, 2, 2), "n_layers": 8, "micro_batches": 8})
    alive = [stage_memory(stage).activations for stage in spec.stages[1:3]]
    assert [blocks_in_flight(stage) for stage in spec.stages] == [4 * 2, 3 * 2, 2 * 2, 2]
    assert alive[0] / alive[1] == pytest.approx(3 / 2, rel=0.1)  # buffers of transfers


def test_tied_weight_is_on_first_and_last_stage() -> None:
    tied = make_spec("cpu", 3, {"n_layers": 3, "tie_embeddings": True})
    untied = make_spec("cpu", 3, {"n_layers": 3})
    for each, other in zip(tied.stages, untied.stages, strict=True):
        assert shard_bytes(each) == shard_bytes(other) == stage_memory(each).parameters


def test_asynchronous_save_copies_the_shards_of_the_stage() -> None:
    spec = replace(make_spec("cpu", 2, {"pp_layers": (3, 1)}), async_save=True)
    for stage in spec.stages:
        assert stage_memory(stage).host == copied_bytes(stage) == 3 * shard_bytes(stage)


def test_host_memory_of_gpus_is_that_of_the_fullest_stage() -> None:
    spec = replace(make_spec("cuda", 2, {"pp_layers": (1, 3)}), async_save=True)
    copies = [copied_bytes(stage) for stage in spec.stages]
    assert host_bytes(spec) == copies[1] > copies[0]
