"""Rules between sections: what is refused names exactly the values that would not be."""

import re
from dataclasses import replace
from typing import Any

import pytest

from checkpoint.config import CheckpointConfig
from data.config import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, Processes, resolve_mesh
from resilience.config import FaultsConfig
from training.config import TrainConfig, ValidationConfig
from training.config_rules import (
    batch_errors,
    device_errors,
    for_every_stage,
    model_errors,
    parallel_errors,
    saving_errors,
    stage_errors,
    stream_errors,
    stream_shard_errors,
)

MODEL = ModelConfig("small", 96, 2, 12, 6, 120, 240)
PARALLEL = ParallelConfig()
CPU, GPU = Processes("cpu", 1, 1, "self"), Processes("cuda", 1, 1, "self")


def named_values(problem: str) -> list[int]:
    """The list after the last "use"."""
    *_, text = re.findall(r"use ((?:\d+, )*\d+(?: or \d+)?)", problem)
    return [int(number) for number in re.findall(r"\d+", text)]


def keys_refused(found: list[str], key: str) -> bool:
    return any(key in problem for problem in found)


@pytest.mark.parametrize("key", ["n_heads", "n_kv_heads", "ffn_dim", "vocab_size"])
def test_tp_names_every_size_that_divides_what_it_cuts(key: str) -> None:
    def refused(tp: int) -> list[str]:
        found = model_errors(MeshShape(1, 1, 1, tp), PARALLEL, MODEL, 5040)
        return [problem for problem in found if f"model.{key} " in problem]

    [problem] = refused(7)
    assert f"parallel.tp=7 does not divide model.{key} ({getattr(MODEL, key)})" in problem
    assert named_values(problem) == [tp for tp in range(1, 1025) if not refused(tp)]


@pytest.mark.parametrize("seq_len", [48, 50, 63])
def test_cp_names_every_size_whose_double_divides_the_sequence(seq_len: int) -> None:
    def refused(cp: int) -> list[str]:
        return model_errors(MeshShape(1, 1, cp, 1), PARALLEL, MODEL, seq_len)

    [problem] = refused(9)
    assert f"parallel.cp=9 cuts a sequence into 18 chunks, and train.seq_len={seq_len}" in problem
    assert named_values(problem) == [cp for cp in range(1, 1025) if not refused(cp)]


@pytest.mark.parametrize("cp", [1, 2])
def test_tp_cuts_what_cp_leaves_of_a_sequence(cp: int) -> None:
    def refused(tp: int, parallel: ParallelConfig = PARALLEL) -> list[str]:
        found = model_errors(MeshShape(1, 1, cp, tp), parallel, MODEL, 24)
        return [problem for problem in found if "train.seq_len" in problem]

    [problem] = refused(5)
    assert f"({24 // cp})" in problem and "sequence_parallel=false" in problem
    assert named_values(problem) == [tp for tp in range(1, 1025) if not refused(tp)]
    assert not refused(5, replace(PARALLEL, sequence_parallel=False))


def test_batch_names_the_nearest_multiples_and_every_number_of_data_ranks() -> None:
    def refused(replicate: int, shard: int, batch: int = 12) -> list[str]:
        train = TrainConfig(max_steps=1, global_batch_size=batch, seq_len=8)
        return batch_errors(MeshShape(replicate, shard, 1, 1), train)

    [problem] = refused(2, 4)
    assert "train.global_batch_size=12 is not a multiple of the 8 data ranks" in problem
    assert not refused(2, 4, batch=8) and not refused(2, 4, batch=16) and "use 8 or 16" in problem
    ranks = [n for n in range(1, 13) if not refused(1, n)]
    assert problem.endswith("1, 2, 3, 4, 6 or 12 data ranks") and ranks == [1, 2, 3, 4, 6, 12]
    [problem] = refused(32, 1)
    assert "use 32," in problem


def test_micro_batch_names_every_size_that_divides_a_rank_s_share() -> None:
    def refused(size: int) -> list[str]:
        train = TrainConfig(max_steps=1, global_batch_size=24, seq_len=8, micro_batch_size=size)
        return batch_errors(MeshShape(1, 2, 1, 1), train)

    [problem] = refused(5)
    assert "train.micro_batch_size=5" in problem
    assert named_values(problem) == [size for size in range(1, 13) if not refused(size)]


@pytest.mark.parametrize("world_size", [6, 8])
def test_world_size_names_every_product_of_the_other_axes(world_size: int) -> None:
    def refused(tp: int) -> list[str]:
        return resolve_mesh(ParallelConfig(tp=tp), world_size)[1]

    [problem] = refused(5)
    assert f"for {world_size} processes: start a multiple of 5 processes" in problem
    admitted = [tp for tp in range(1, world_size + 1) if not refused(tp)]
    assert problem.endswith("one of " + ", ".join(map(str, admitted)))


def test_meshes_that_divide_batch_and_model_have_no_problem() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=16, seq_len=128)
    for sizes in ((1, 1, 1, 1), (2, 4, 1, 2), (1, 2, 8, 2), (4, 4, 2, 6), (16, 1, 64, 1)):
        mesh = MeshShape(*sizes)
        if train.seq_len // mesh.cp % mesh.tp == 0:
            assert model_errors(mesh, PARALLEL, MODEL, train.seq_len) == []
        assert batch_errors(mesh, train) == []


def staged(*stages: StageConfig) -> DataConfig:
    return DataConfig("x", "x", {"a": SourceConfig("stdlib")}, stages=list(stages))


def test_sizes_of_every_stage_are_checked_and_told_by_the_key_that_gave_them() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=8, seq_len=64, micro_batch_size=4)
    mesh = MeshShape(1, 2, 1, 1)
    data = staged(
        StageConfig(8, global_batch_size=12),  # micro-batches of 4 do not divide 6
        StageConfig(32, seq_len=9),  # once more the same batch: told once
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


def test_a_stage_begins_with_a_step() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=8, seq_len=64)

    def problems(*stages: StageConfig) -> list[str]:
        return stage_errors(train, staged(*stages))

    assert problems(StageConfig(16, global_batch_size=3), StageConfig(22)) == []
    [problem] = problems(StageConfig(17))
    assert "data.stages[0].from_sample=17" in problem and problem.endswith("use 16 or 24")
    [problem] = problems(StageConfig(16, global_batch_size=3), StageConfig(18))
    assert "data.stages[1].from_sample=18" in problem and problem.endswith("use 19")


def of_device(processes: Processes = CPU, mesh: MeshShape | None = None, **wanted: object) -> str:
    """The problems of a device, joined; `wanted` are fields of any section."""
    sections: list[Any] = [PARALLEL, PrecisionConfig(), MODEL]
    for number, section in enumerate(sections):
        own = {key: value for key, value in wanted.items() if hasattr(section, key)}
        sections[number] = replace(section, **own)
    parallel, precision, model = sections
    found = device_errors(
        processes.accelerator, mesh or MeshShape(1, 1, 1, 1), parallel, precision, model
    )
    return "\n".join(found)


def stream(lanes: int | None) -> DataConfig:
    sources = {"web": SourceConfig("huggingface", "who/what", streaming=True)}
    return DataConfig("web", "unused", sources, stream_shards=lanes)


def test_lanes_name_every_number_that_batch_and_data_ranks_admit() -> None:
    def refused(lanes: int, batch: int = 24, dp: int = 1) -> list[str]:
        train = TrainConfig(max_steps=1, global_batch_size=batch, seq_len=64)
        return stream_shard_errors(MeshShape(1, dp, 1, 1), train, stream(lanes))

    [problem] = refused(9)
    assert "train.global_batch_size=24 is not a multiple of data.stream_shards=9" in problem
    assert "use 18 or 27, or" in problem and not refused(9, 18) and not refused(9, 27)
    *_, text = problem.partition("27, or ")
    assert [int(n) for n in re.findall(r"\d+", text)] == [n for n in range(1, 25) if not refused(n)]
    [problem] = refused(6, dp=4)
    assert "data.stream_shards=6 is not a multiple of the 4 data ranks" in problem
    assert "use 4 or 8, or 1, 2, 3 or 6 data ranks" in problem
    assert not refused(4, dp=4) and not refused(8, dp=4) and not refused(6, dp=3)
    assert "use 4, or" in refused(3, dp=4)[0]
    assert len(refused(9, dp=4)) == 2


def test_no_lanes_no_rule_of_lanes() -> None:
    train = TrainConfig(max_steps=1, global_batch_size=7, seq_len=64)
    assert not stream_shard_errors(MeshShape(1, 2, 1, 1), train, stream(None))
    assert not stream_errors(stream(None), TokenizerConfig("bpe", 4096), ValidationConfig())


def test_a_stream_trains_no_tokenizer_and_holds_nothing_out() -> None:
    def found(tokenizer: TokenizerConfig, samples: int) -> list[str]:
        return stream_errors(stream(4), tokenizer, ValidationConfig(samples=samples))

    byte, trained = TokenizerConfig("byte", 272), TokenizerConfig("bpe", 4096)
    assert not found(byte, 0) and not found(replace(trained, path="tokenizer.model"), 0)
    [problem] = found(byte, 8)
    assert problem.startswith("validation.samples=8") and "use validation.samples=0" in problem
    [problem] = found(trained, 0)
    assert problem.startswith("tokenizer.path=null") and "use tokenizer=llama3 or byte" in problem


def test_kernels_that_the_device_or_an_axis_does_not_admit_are_refused_with_the_reason() -> None:
    assert of_device() == of_device(attention="sdpa") == of_device(GPU, attention="flex") == ""
    for kernel in ("flex", "varlen"):
        assert f"model.attention={kernel} has no backward on CPU" in of_device(attention=kernel)
    assert "precision.param is fp32" in of_device(GPU, attention="varlen", param="fp32")
    cut = of_device(GPU, MeshShape(1, 1, 2, 1), attention="varlen")
    assert "parallel.cp=2 cuts them" in cut


def test_async_tp_tells_everything_that_it_lacks() -> None:
    message = of_device(async_tp=True, sequence_parallel=False)
    for reason in ("symmetric memory", "parallel.tp=1", "parallel.compile", "along seq"):
        assert reason in message
    assert "parallel.tp=1" not in of_device(mesh=MeshShape(1, 1, 1, 2), async_tp=True)


def test_async_tp_is_refused_where_the_asked_for_gpu_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In words, not by an error of CUDA's."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = of_device(GPU, MeshShape(1, 1, 1, 2), async_tp=True, compile=True)
    assert "symmetric memory" in message and "\n" not in message


def test_memory_budget_needs_the_compiler() -> None:
    [error] = parallel_errors(ParallelConfig(activation_checkpoint=0.5))
    assert "parallel.activation_checkpoint=0.5" in error and "parallel.compile=false" in error
    assert parallel_errors(ParallelConfig(activation_checkpoint=0.5, compile=True)) == []


def test_what_is_kept_is_among_what_is_saved() -> None:
    def refused(interval: int | None, keep_every: int | None) -> list[str]:
        checkpoint = CheckpointConfig(interval=interval, keep_every=keep_every)
        return saving_errors(checkpoint, FaultsConfig())

    [problem] = refused(40, 100)
    assert "checkpoint.keep_every=100" in problem and "checkpoint.interval=40" in problem
    assert "use 80 or 120 for" in problem and not refused(40, 80) and not refused(40, 120)
    saved, kept = set(range(40, 1001, 40)), set(range(100, 1001, 100))
    assert f"every {min(saved & kept)}th step" in problem
    [problem] = refused(40, 30)
    assert "use 40 for" in problem
    [problem] = refused(None, 100)
    assert "checkpoint.interval=null" in problem and "checkpoint.interval=100" in problem
    assert not refused(100, 100) and not refused(None, None) and not refused(40, None)


def test_no_save_is_skipped_where_none_is_under_way() -> None:
    [problem] = saving_errors(CheckpointConfig(async_save=False, when_busy="skip"), FaultsConfig())
    assert "checkpoint.when_busy=skip" in problem and "checkpoint.async_save" in problem
    assert not saving_errors(CheckpointConfig(when_busy="skip"), FaultsConfig())
    assert not saving_errors(CheckpointConfig(async_save=False), FaultsConfig())


def test_a_rewind_needs_a_checkpoint() -> None:
    rewinding = FaultsConfig(rewind_on_spike=True)
    [problem] = saving_errors(CheckpointConfig(interval=None), rewinding)
    assert "faults.rewind_on_spike=true" in problem and "checkpoint.interval_minutes" in problem
    assert not saving_errors(CheckpointConfig(interval=None, interval_minutes=5), rewinding)
    assert not saving_errors(CheckpointConfig(interval=5), rewinding)
    assert not saving_errors(CheckpointConfig(interval=None), FaultsConfig())
