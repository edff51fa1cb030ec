"""Cross-field rules: an error lists exactly the values that are valid."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.config import CheckpointConfig
from data.config import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from model.config import ModelConfig, attention_kernel
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, resolve_mesh
from resilience.config import FaultsConfig
from resilience.processes import Processes
from training.config import RunConfig, TrainConfig, ValidationConfig
from training.config_rules import (
    batch_errors,
    compiler_errors,
    data_errors,
    device_errors,
    for_every_stage,
    model_errors,
    parallel_errors,
    run_errors,
    saving_errors,
    stage_errors,
    stream_errors,
    stream_shard_errors,
    tokenizer_errors,
)

MODEL = ModelConfig("small", 192, 2, 12, 6, 120, 240)
PARALLEL = ParallelConfig()
CPU, GPU = Processes("cpu", 1, 1, "self"), Processes("cuda", 1, 1, "self")


def listed_values(error: str) -> list[int]:
    """Return the numbers after the last "use"."""
    *_, text = re.findall(r"use ((?:\d+, )*\d+(?: or \d+)?)", error)
    return [int(number) for number in re.findall(r"\d+", text)]


def any_error_names(found: list[str], key: str) -> bool:
    return any(key in error for error in found)


@pytest.mark.parametrize("key", ["n_heads", "n_kv_heads", "ffn_dim", "vocab_size"])
def test_tp_error_lists_every_valid_size(key: str) -> None:
    def rejected(tp: int) -> list[str]:
        found = model_errors(MeshShape(1, 1, 1, tp), PARALLEL, MODEL, 5040)
        return [error for error in found if f"model.{key}=" in error]

    [error] = rejected(7)
    assert f"parallel.tp=7 does not divide model.{key}={getattr(MODEL, key)}" in error
    assert listed_values(error) == [tp for tp in range(1, 1025) if not rejected(tp)]


@pytest.mark.parametrize("seq_len", [48, 50, 63])
def test_cp_error_lists_every_valid_size(seq_len: int) -> None:
    def rejected(cp: int) -> list[str]:
        return list(model_errors(MeshShape(1, 1, cp, 1), PARALLEL, MODEL, seq_len))

    [error] = rejected(9)
    assert f"parallel.cp=9 splits a sequence into 18 chunks, but train.seq_len={seq_len}" in error
    assert listed_values(error) == [cp for cp in range(1, 1025) if not rejected(cp)]


@pytest.mark.parametrize("cp", [1, 2])
def test_sequence_parallel_needs_tp_to_divide_the_local_sequence(cp: int) -> None:
    def rejected(tp: int, parallel: ParallelConfig = PARALLEL) -> list[str]:
        found = model_errors(MeshShape(1, 1, cp, tp), parallel, MODEL, 24)
        return [error for error in found if "train.seq_len" in error]

    [error] = rejected(5)
    assert f"{24 // cp}; use" in error and "sequence_parallel=false" in error
    assert listed_values(error) == [tp for tp in range(1, 1025) if not rejected(tp)]
    assert not rejected(5, replace(PARALLEL, sequence_parallel=False))


def test_batch_error_lists_nearest_multiples_and_valid_data_ranks() -> None:
    def rejected(replicate: int, shard: int, batch: int = 12) -> list[str]:
        train = TrainConfig(max_steps=1, global_batch_size=batch, seq_len=8)
        return list(batch_errors(MeshShape(replicate, shard, 1, 1), train))

    [error] = rejected(2, 4)
    assert "train.global_batch_size=12 is not a multiple of the 8 data ranks" in error
    assert not rejected(2, 4, batch=8) and not rejected(2, 4, batch=16) and "use 8 or 16" in error
    ranks = [n for n in range(1, 13) if not rejected(1, n)]
    assert error.endswith("1, 2, 3, 4, 6 or 12 data ranks") and ranks == [1, 2, 3, 4, 6, 12]
    [error] = rejected(32, 1)
    assert "use 32," in error


def test_micro_batch_error_lists_every_divisor_of_the_rank_batch() -> None:
    def rejected(size: int) -> list[str]:
        train = TrainConfig(max_steps=1, global_batch_size=24, seq_len=8, micro_batch_size=size)
        return list(batch_errors(MeshShape(1, 2, 1, 1), train))

    [error] = rejected(5)
    assert "train.micro_batch_size=5" in error
    assert listed_values(error) == [size for size in range(1, 13) if not rejected(size)]


@pytest.mark.parametrize("world_size", [6, 8])
def test_world_size_error_lists_every_valid_product_of_axes(world_size: int) -> None:
    def rejected(tp: int) -> list[str]:
        return resolve_mesh(ParallelConfig(tp=tp), world_size)[1]

    [error] = rejected(5)
    assert f"processes, not {world_size}; start a multiple of 5 processes" in error
    admitted = [tp for tp in range(1, world_size + 1) if not rejected(tp)]
    assert error.endswith("one of " + ", ".join(map(str, admitted)))


def test_valid_meshes_have_no_errors() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=16, seq_len=128)
    for sizes in ((1, 1, 1, 1), (2, 4, 1, 2), (1, 2, 8, 2), (4, 4, 2, 6), (16, 1, 64, 1)):
        mesh = MeshShape(*sizes)
        if train.seq_len // mesh.cp % mesh.tp == 0:
            assert not list(model_errors(mesh, PARALLEL, MODEL, train.seq_len))
        assert not list(batch_errors(mesh, train))


def staged(*stages: StageConfig) -> DataConfig:
    return DataConfig("x", "x", {"a": SourceConfig("stdlib")}, stages=list(stages))


def test_stage_sizes_are_checked_and_reported_under_the_stage_key() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=8, seq_len=64, micro_batch_size=4)
    mesh = MeshShape(1, 2, 1, 1)
    data = staged(
        StageConfig(8, global_batch_size=12),  # micro-batches of 4 do not divide 6
        StageConfig(32, seq_len=9),  # the same batch again: reported once
        StageConfig(56, global_batch_size=7, micro_batch_size=1),
    )
    found = for_every_stage(train, data, lambda sizes: batch_errors(mesh, sizes))
    first, second = found
    assert first.startswith("train.micro_batch_size=4 does not divide the 6 sequences")
    assert second.startswith("data.stages[2].global_batch_size=7 is not a multiple")
    lengths = for_every_stage(
        train,
        data,
        lambda sizes: model_errors(MeshShape(1, 1, 2, 1), PARALLEL, MODEL, sizes.seq_len),
    )
    assert len(lengths) == 1 and "data.stages[1].seq_len=9 is not a multiple" in lengths[0]
    assert for_every_stage(train, staged(), lambda sizes: batch_errors(mesh, sizes)) == []


def test_stage_must_start_at_a_step_boundary() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=8, seq_len=64)

    def errors(*stages: StageConfig) -> list[str]:
        return list(stage_errors(train, staged(*stages)))

    assert errors(StageConfig(16, global_batch_size=3), StageConfig(22)) == []
    [error] = errors(StageConfig(17))
    assert "data.stages[0].from_sample=17" in error and error.endswith("use 16 or 24")
    [error] = errors(StageConfig(16, global_batch_size=3), StageConfig(18))
    assert "data.stages[1].from_sample=18" in error and error.endswith("use 19")


def device_text(processes: Processes = CPU, mesh: MeshShape | None = None, **wanted: object) -> str:
    """Return the device errors joined; `wanted` are fields of any section."""
    sections: list[Any] = [PARALLEL, PrecisionConfig(), MODEL]
    for number, section in enumerate(sections):
        own = {key: value for key, value in wanted.items() if hasattr(section, key)}
        sections[number] = replace(section, **own)
    parallel, precision, model = sections
    found = device_errors(
        processes.accelerator, mesh or MeshShape(1, 1, 1, 1), parallel, precision, model, (8, 0)
    )
    return "\n".join(found)


def stream(shards: int | None) -> DataConfig:
    sources = {"web": SourceConfig("huggingface", "who/what", streaming=True)}
    return DataConfig("web", "unused", sources, stream_shards=shards)


def test_stream_shard_errors_list_valid_numbers() -> None:
    def rejected(shards: int, batch: int = 24, dp: int = 1) -> list[str]:
        train = TrainConfig(max_steps=1, global_batch_size=batch, seq_len=64)
        return list(stream_shard_errors(MeshShape(1, dp, 1, 1), train, stream(shards)))

    [error] = rejected(9)
    assert "train.global_batch_size=24 is not a multiple of data.stream_shards=9" in error
    assert "use 18 or 27, or" in error and not rejected(9, 18) and not rejected(9, 27)
    *_, text = error.partition("27, or ")
    assert [int(n) for n in re.findall(r"\d+", text)] == [
        n for n in range(1, 25) if not rejected(n)
    ]
    [error] = rejected(6, dp=4)
    assert "data.stream_shards=6 is not a multiple of the 4 data ranks" in error
    assert "use 4 or 8, or 1, 2, 3 or 6 data ranks" in error
    assert not rejected(4, dp=4) and not rejected(8, dp=4) and not rejected(6, dp=3)
    assert "use 4, or" in rejected(3, dp=4)[0]
    assert len(rejected(9, dp=4)) == 2


def test_prepared_data_has_no_stream_errors() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=7, seq_len=64)
    assert not list(stream_shard_errors(MeshShape(1, 2, 1, 1), train, stream(None)))
    assert not list(stream_errors(stream(None), TokenizerConfig("bpe", 4096), ValidationConfig()))


def test_stream_rejects_tokenizer_training_and_validation() -> None:
    def found(tokenizer: TokenizerConfig, samples: int) -> list[str]:
        return list(stream_errors(stream(4), tokenizer, ValidationConfig(samples=samples)))

    byte, trained = TokenizerConfig("byte", 272), TokenizerConfig("bpe", 4096)
    assert not found(byte, 0) and not found(replace(trained, path="tokenizer.model"), 0)
    [error] = found(byte, 8)
    assert error.startswith("validation.samples=8") and "use validation.samples=0" in error
    [error] = found(trained, 0)
    assert error.startswith("tokenizer.path=null") and "use tokenizer=llama3 or byte" in error


def test_unsupported_attention_kernels_are_rejected_with_the_reason() -> None:
    assert (
        device_text() == device_text(attention="sdpa") == device_text(GPU, attention="flex") == ""
    )
    for kernel in ("flex", "varlen"):
        assert f"model.attention={kernel} has no backward on CPU" in device_text(attention=kernel)
    assert "precision.param=fp32" in device_text(GPU, attention="varlen", param="fp32")
    cut = device_text(GPU, MeshShape(1, 1, 2, 1), attention="varlen")
    assert "parallel.cp=2 splits them" in cut


@pytest.mark.parametrize(
    ("head_dim", "capability", "supported"),
    [
        (128, (8, 9), True),
        (4, (9, 0), False),  # not a multiple of 8
        (264, (9, 0), False),
        (200, (8, 0), True),
        (200, (9, 0), True),
        (200, (10, 3), True),
        (200, (8, 6), False),  # the backward needs more shared memory
        (200, (12, 0), False),
        (256, (8, 9), True),
    ],
)
def test_varlen_is_rejected_for_head_sizes_that_a_gpu_cannot_train(
    head_dim: int, capability: tuple[int, int], supported: bool
) -> None:
    model = replace(MODEL, dim=head_dim * MODEL.n_heads, attention="varlen")
    shared = "cuda", MeshShape(1, 1, 1, 1), PARALLEL, PrecisionConfig()
    found = list(device_errors(*shared, model, capability))
    rule = f"model.attention=varlen needs model.dim / model.n_heads to be .* but it is {head_dim}; "
    assert bool(found) != supported
    assert all(re.match(rule + "use model.attention=auto or sdpa", each) for each in found)
    assert not list(device_errors(*shared, replace(model, attention="auto"), capability))


@pytest.mark.parametrize(
    ("head_dim", "capability", "supported"),
    [
        (8, (9, 0), False),
        (36, (8, 6), True),
        (128, (12, 0), True),
        (192, (8, 0), True),
        (256, (9, 0), True),
        (264, (9, 0), False),
        (136, (8, 6), False),  # the backward needs more shared memory
        (256, (8, 9), False),
        (256, (12, 1), False),
        (64, (7, 5), True),
        (128, (7, 5), False),
    ],
)
def test_flex_is_rejected_for_head_sizes_that_a_gpu_cannot_train(
    head_dim: int, capability: tuple[int, int], supported: bool
) -> None:
    model = replace(MODEL, dim=head_dim * MODEL.n_heads, attention="flex")
    shared = "cuda", MeshShape(1, 1, 1, 1), PARALLEL, PrecisionConfig()
    found = list(device_errors(*shared, model, capability))
    rule = f"model.attention=flex needs model.dim / model.n_heads to be .*, but it is {head_dim}; "
    assert bool(found) != supported
    assert all(re.match(rule + "use model.attention=auto or sdpa", each) for each in found)
    if not supported:
        kernels = {attention_kernel("auto", head_dim, capability, True, False)}
        assert kernels == {"sdpa"}


def test_async_tp_reports_every_missing_requirement() -> None:
    message = device_text(async_tp=True, sequence_parallel=False)
    for reason in ("symmetric memory", "parallel.tp=1", "parallel.compile", "along the sequence"):
        assert reason in message
    assert "parallel.tp=1" not in device_text(mesh=MeshShape(1, 1, 1, 2), async_tp=True)


def test_async_tp_without_a_gpu_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = device_text(GPU, MeshShape(1, 1, 1, 2), async_tp=True, compile=True)
    assert "symmetric memory" in message and "\n" not in message


def test_all_data_and_tokenizer_errors_are_reported() -> None:
    source = SourceConfig("text", weight=0.0, revision="main")
    errors = list(data_errors(DataConfig("x", "folder", {"a/b": source})))
    for part in (
        "a/b is not a folder name",
        "a/b.path=null",
        "a/b.weight=0.0",
        "a/b.revision=main",
    ):
        assert sum(f"data.sources.{part}" in error for error in errors) == 1, (part, errors)
    assert len(errors) == 4
    assert list(tokenizer_errors(TokenizerConfig("byte", 256))) == [
        "tokenizer.vocab_size=256 does not match tokenizer byte; use 272"
    ]
    assert len(list(tokenizer_errors(TokenizerConfig("bpe", 100)))) == 1


def test_memory_budget_needs_the_compiler() -> None:
    [error] = parallel_errors(ParallelConfig(activation_checkpoint=0.5, compile=False))
    assert "parallel.activation_checkpoint=0.5" in error and "parallel.compile=false" in error
    assert not list(parallel_errors(ParallelConfig(activation_checkpoint=0.5, compile=True)))


def test_keep_every_must_be_a_multiple_of_the_interval() -> None:
    def rejected(interval: int | None, keep_every: int | None) -> list[str]:
        checkpoint = CheckpointConfig(interval=interval, keep_every=keep_every)
        return list(saving_errors(checkpoint, FaultsConfig()))

    [error] = rejected(40, 100)
    assert "checkpoint.keep_every=100" in error and "checkpoint.interval=40" in error
    assert (
        "checkpoint.keep_every=80 or 120" in error
        and not rejected(40, 80)
        and not rejected(40, 120)
    )
    saved, kept = set(range(40, 1001, 40)), set(range(100, 1001, 100))
    assert f"every {min(saved & kept)}th step" in error
    [error] = rejected(40, 30)
    assert "checkpoint.keep_every=40" in error
    [error] = rejected(None, 100)
    assert "checkpoint.interval=null" in error and "checkpoint.interval=100" in error
    assert not rejected(100, 100) and not rejected(None, None) and not rejected(40, None)


def test_skip_when_busy_needs_async_save() -> None:
    [error] = saving_errors(CheckpointConfig(async_save=False, when_busy="skip"), FaultsConfig())
    assert "checkpoint.when_busy=skip" in error and "checkpoint.async_save" in error
    assert not list(saving_errors(CheckpointConfig(when_busy="skip"), FaultsConfig()))
    assert not list(saving_errors(CheckpointConfig(async_save=False), FaultsConfig()))


def test_rewind_on_spike_needs_a_checkpoint() -> None:
    rewinding = FaultsConfig(rewind_on_spike=True)
    [error] = saving_errors(CheckpointConfig(interval=None), rewinding)
    assert "faults.rewind_on_spike=true" in error and "checkpoint.interval_minutes" in error
    assert not list(saving_errors(CheckpointConfig(interval=None, interval_minutes=5), rewinding))
    assert not list(saving_errors(CheckpointConfig(interval=5), rewinding))
    assert not list(saving_errors(CheckpointConfig(interval=None), FaultsConfig()))


@pytest.mark.parametrize("resume", ["auto", "never", "runs/a/checkpoints/step-00000008"])
@pytest.mark.parametrize("init_from", [None, "Llama-3.2-1B"])
def test_initial_weights_and_a_checkpoint_exclude_each_other(
    init_from: str | None, resume: str
) -> None:
    found = list(run_errors(RunConfig("a", "runs/a", init_from=init_from, resume=resume)))
    assert bool(found) == (init_from is not None and resume.startswith("runs/"))


@pytest.mark.parametrize(("accelerator", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compiler_variable_must_name_an_executable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accelerator: str, variable: str
) -> None:
    """Inductor and Triton run the value as it is."""

    def errors() -> list[str]:
        mesh, compiled = MeshShape(1, 1, 1, 1), ParallelConfig(compile=True)
        return list(
            compiler_errors(accelerator, mesh, compiled, PrecisionConfig(), MODEL, True, (9, 0))
        )

    path = tmp_path / "g++"
    path.touch()
    for value in (str(path), str(tmp_path / "missing"), "gcc -m64", ""):
        monkeypatch.setenv(variable, value)
        [error] = errors()
        assert f"but {variable}={value} is not an executable file; run: unset {variable}" in error
    monkeypatch.delenv(variable)
    assert errors() == []
    path.chmod(0o755)
    monkeypatch.setenv(variable, str(path))
    assert errors() == []
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "")
    [error] = errors()
    assert f"compiler ({variable}, " in error
