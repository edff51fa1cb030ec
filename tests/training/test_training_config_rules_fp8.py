"""Requirements of fp8 on GPU, model and batch."""

from dataclasses import replace
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from training.config import TrainConfig
from training.config_rules import fp8_errors, inference_errors, mesh_errors, precision_errors

MODEL = ModelConfig("some", dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=50)
TRAIN = TrainConfig(max_steps=1, global_batch_size=4, seq_len=32)
DATA = DataConfig("x", "x", {"a": SourceConfig("stdlib")})
ONE = MeshShape(1, 1, 1, 1)


def errors(
    recipe: Any = "tensorwise",
    mesh: MeshShape = ONE,
    model: ModelConfig = MODEL,
    train: TrainConfig = TRAIN,
    accelerator: str = "cuda",
    capability: tuple[int, int] = (9, 0),
) -> list[str]:
    precision = PrecisionConfig(fp8=recipe)
    mesh_rules = mesh_errors(mesh, ParallelConfig(), precision, model, train, DATA)
    return [*fp8_errors(accelerator, precision, capability), *mesh_rules]


def test_without_fp8_there_are_no_errors() -> None:
    odd = replace(TRAIN, seq_len=7)
    assert errors(None, train=odd, accelerator="cpu") == []
    assert not list(inference_errors(PrecisionConfig(), ParallelConfig()))


@pytest.mark.parametrize(
    ("recipe", "capability", "said"),
    [
        ("tensorwise", (8, 0), ("8.9", "8.0", "use precision.fp8=null")),
        ("tensorwise", (8, 9), None),
        ("tensorwise", (9, 0), None),
        ("rowwise", (8, 0), ("9.0", "8.0", "use precision.fp8=null")),
        ("rowwise", (8, 9), ("9.0", "8.9", "use precision.fp8=tensorwise or")),
        ("rowwise", (9, 0), None),
        ("rowwise", (10, 0), None),
    ],
)
def test_gpu_without_fp8_products_is_rejected(
    recipe: str, capability: tuple[int, int], said: tuple[str, ...] | None
) -> None:
    found = errors(recipe, capability=capability)
    assert len(found) == (said is not None)
    for part in (f"precision.fp8={recipe}", *(said or ())):
        assert all(part in error for error in found), found


@pytest.mark.parametrize(
    ("key", "model", "tp", "remedy"),
    [
        ("model.dim=72", replace(MODEL, dim=72, n_heads=9, n_kv_heads=3), 1, "multiple of 16"),
        ("model.ffn_dim=100", replace(MODEL, ffn_dim=100), 1, "multiple of 16"),
        ("model.ffn_dim=80 over parallel.tp=2 is 40", replace(MODEL, ffn_dim=80), 2, "of 32"),
        ("model.n_kv_heads × head_dim=16", replace(MODEL, n_kv_heads=1), 1, None),
        ("model.n_kv_heads × head_dim=8", replace(MODEL, n_heads=8, n_kv_heads=1), 1, "of 16"),
        (
            "model.n_kv_heads × head_dim=48",
            replace(MODEL, dim=96, n_heads=6, n_kv_heads=3),
            3,
            None,
        ),
    ],
)
def test_local_widths_must_be_multiples_of_16(
    key: str, model: ModelConfig, tp: int, remedy: str | None
) -> None:
    found = [error for error in errors(mesh=MeshShape(1, 1, 1, tp), model=model)]
    matching = [error for error in found if key in error]
    assert len(matching) == (remedy is not None), found
    assert all(str(remedy) in error and "precision.fp8=null" in error for error in matching)


@pytest.mark.parametrize(
    ("micro_batch_size", "seq_len", "cp", "fits"),
    [(1, 32, 1, True), (1, 40, 1, False), (2, 40, 1, True), (None, 20, 1, True), (1, 48, 2, False)],
)
def test_micro_batches_must_be_multiples_of_16_tokens(
    micro_batch_size: int | None, seq_len: int, cp: int, fits: bool
) -> None:
    train = replace(TRAIN, micro_batch_size=micro_batch_size, seq_len=seq_len)
    found = errors(mesh=MeshShape(1, 1, cp, 1), train=train)
    assert len(found) == (not fits)
    for error in found:
        assert f"train.seq_len={seq_len}" in error
        assert f"multiple of {16 * cp}" in error and "precision.fp8=null" in error


def test_fp8_rejects_fp32_parameters() -> None:
    for param, refused in (("auto", False), ("bf16", False), ("fp32", True)):
        precision = PrecisionConfig(param=param, fp8="rowwise")  # type: ignore[arg-type]
        found = list(precision_errors(precision))
        assert len(found) == refused
        assert all("precision.param=bf16" in error for error in found)


def test_inference_rejects_fp8() -> None:
    [error] = inference_errors(PrecisionConfig(fp8="rowwise"), ParallelConfig())
    assert error == "precision.fp8=rowwise is for training only; use precision.fp8=null"
