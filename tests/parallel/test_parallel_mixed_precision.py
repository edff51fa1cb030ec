"""Mixed precision without FSDP2 matches FSDP2 bit for bit and frees its copies of the weights."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from save_checkpoint import save
from small_run import (
    BATCH,
    OPTIM,
    SEED,
    SEQ,
    STEPS,
    Case,
    batch,
    build,
    local_batches,
    model_config,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint.position import Position
from checkpoint.restore import load
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.compilation import apply_compile
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.data_parallel import apply_data_parallel, mixed_precision_policy
from parallel.parallelize import initialize_weights, local_block, parallelize
from planning.hardware import load_hardware
from planning.speed import RankCosts
from planning.step_spec import StepSpec
from resilience.run_folder import RunFolder
from train import train_step
from training.optimizer import build_optimizer

CASES = {
    "fp32": Case(n_layers=2),
    "fp32-micro3-tied": Case(n_layers=2, n_micro=3, tied=True),
    "bf16": Case(n_layers=2, n_micro=1, param="bf16"),
    "bf16-micro3-tied": Case(n_layers=2, n_micro=3, param="bf16", tied=True),
    "bf16-full": Case(n_layers=2, param="bf16", activation_checkpoint="full"),
    "bf16-selective": Case(n_layers=2, param="bf16", activation_checkpoint="selective"),
    "bf16-compiled": Case(n_layers=2, param="bf16", compile=True),
}


def parallelize_with_fsdp2(model: Llama, mesh: DeviceMesh, case: Case) -> Llama:
    """Apply the transforms with FSDP2 on a mesh of one rank."""
    if case.activation_checkpoint != "none":
        apply_activation_checkpoint(model, case.activation_checkpoint)
    if case.compile:
        apply_compile(model)
    formats = mixed_precision_policy(PrecisionConfig(param=case.param), "cpu")
    apply_data_parallel(model, mesh, formats, None)
    return model


def differences_from_fsdp2(cases: dict[str, Case]) -> dict[str, list[str]]:
    """Train each case with and without FSDP2 and return the names of the tensors that differ."""
    differences = {}
    for name, case in cases.items():
        results = []
        for plan in (None, partial(parallelize_with_fsdp2, case=case)):
            run = build(case, plan=plan)
            tensors: dict[str, Tensor] = {}
            for step in range(STEPS):
                batches = local_batches(batch(step), 0, 1, case.n_micro)
                tensors[f"scalars {step}"] = train_step(cast(Any, run), batches, OPTIM.lr)[
                    "scalars"
                ]
            for key, parameter in run.llama.named_parameters():
                state = run.adamw.state[parameter]
                tensors |= {key: parameter, f"{key} moment": state["exp_avg"]}
            results.append({key: local_block(t.detach())[0] for key, t in tensors.items()})
        actual, expected = results
        assert actual.keys() == expected.keys()
        differences[name] = [key for key in actual if not torch.equal(actual[key], expected[key])]
    return differences


def test_steps_match_fsdp2_bit_for_bit() -> None:
    assert on_ranks(1, differences_from_fsdp2, CASES)[0] == {name: [] for name in CASES}


class CastRecorder(TorchDispatchMode):
    """Record the source tensors of the casts of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.sources += [source.data_ptr() for source in args[1]]
        return func(*args, **(kwargs or {}))


def copies_during_a_step() -> dict[str, Any]:
    """Return dtype and memory of the bf16 copies at points of a step of two micro-batches."""
    run = build(Case(n_layers=2, param="bf16", tied=True))
    llama, masters = run.llama, list(run.llama.parameters())
    results: dict[str, Any] = {"masters": len(masters)}
    copies: list[nn.Parameter] = []

    def record_copies(*_: Any) -> None:
        copies[:] = llama.parameters()

    def state() -> tuple[set[int], bool]:
        """Return the bytes per element of the copies, and whether the masters are restored."""
        n_bytes = {p.untyped_storage().nbytes() // p.numel() for p in copies}
        return n_bytes, all(a is b for a, b in zip(llama.parameters(), masters, strict=True))

    llama.loss.register_forward_pre_hook(record_copies)
    first, last = local_batches(batch(0), 0, 1, 2).micro_batches
    with CastRecorder() as casts:
        with run.fabric.no_backward_sync(run.model, enabled=True):
            loss = run.model(*first)
            results["forward"] = {p.dtype for p in copies}, state()
            run.fabric.backward(loss)
            results["first_backward"] = state()
        run.fabric.backward(run.model(*last))
        results["last_backward"] = state()
    results["casts"] = sorted(casts.sources) == sorted(p.data_ptr() for p in masters)
    results["gradients"] = {p.grad.dtype for p in masters if p.grad is not None}
    return results


def test_copies_are_made_once_per_step_and_freed_after_the_last_backward() -> None:
    results = on_ranks(1, copies_during_a_step)[0]
    assert results["forward"] == ({torch.bfloat16}, ({2}, False))
    assert results["first_backward"] == ({2}, True)
    assert results["last_backward"] == ({0}, True)
    # Nine parameters per block and two others; the tied weight is copied only once.
    assert results["casts"] and results["masters"] == 20
    assert results["gradients"] == {torch.float32}


def undetected_writes(folder: Path) -> list[str]:
    """Return the kinds of writes to the weights after which a forward uses outdated copies."""
    case = Case(n_layers=2, param="bf16")
    run, fresh = build(case), build(case)
    tokens, positions, labels = local_batches(batch(0), 0, 1, 1).micro_batches[0]
    save(RunFolder(folder), run.llama, run.adamw, Position(1, 0, 0, "of the test"), {})
    optimizer_8bit = build_optimizer(run.llama, OPTIM, "int8")

    def logits(llama: Llama) -> Tensor:
        with torch.no_grad():
            return llama(tokens, positions)

    writes = {
        "optimizer": run.adamw.step,
        "restoring": lambda: load(RunFolder(folder).step_folder(1), run.llama, run.adamw),
        "8-bit optimizer": optimizer_8bit.step,
        "initial weights": lambda: initialize_weights(run.llama, run.llama.config, SEED + 1),
    }
    undetected = []
    for name, write in writes.items():
        run.fabric.backward(run.model(tokens, positions, labels))
        before = logits(run.llama)  # creates copies
        write()
        fresh.llama.load_state_dict(run.llama.state_dict())
        after = logits(run.llama)
        if torch.equal(before, after) or not torch.equal(after, logits(fresh.llama)):
            undetected.append(name)
    return undetected


def test_forward_uses_the_new_weights_after_any_kind_of_write(tmp_path: Path) -> None:
    assert on_ranks(1, undetected_writes, tmp_path)[0] == []


def parameter_dtypes_after_failed_forward() -> set[torch.dtype]:
    run = build(Case(param="bf16"))
    with torch.no_grad(), pytest.raises(IndexError):
        run.model(torch.full((1, 4), run.llama.config.vocab_size))
    return {parameter.dtype for parameter in run.llama.parameters()}


def test_failed_forward_restores_the_float32_parameters() -> None:
    assert on_ranks(1, parameter_dtypes_after_failed_forward)[0] == {torch.float32}


class MemoryTraffic(TorchDispatchMode):
    """Sum the bytes that casts and sums of weight and gradient matrices read and write."""

    def __init__(self, sizes: set[int], gathers: bool) -> None:
        super().__init__()
        self.sizes, self.gathers, self.bytes = sizes, gathers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._foreach_copy_.default and self.gathers:
            self.bytes += sum(t.nbytes for part in args[:2] for t in part)
        elif func is torch.ops.aten._to_copy.default and args[0].numel() in self.sizes:
            self.bytes += args[0].nbytes + out.nbytes
        elif func is torch.ops.fsdp.chunk_cat.default:  # copy into the reduction buffer
            self.bytes += sum(t.nbytes for t in args[0]) + kwargs["out"].nbytes
        elif func is torch.ops.aten.add_.Tensor and args[0].numel() in self.sizes:
            self.bytes += 2 * args[0].nbytes + args[1].nbytes
        return out


def measured_and_planned_bytes(cases: list[Case]) -> list[tuple[float, float]]:
    """Return the bytes of a step, measured by operation and from the closed form of planning.

    On a mesh only gradients are compared, since FSDP2 moves gathered weights in other ways too.
    """
    results = []
    for case in cases:
        run = build(case)
        matrices = [p for p in run.llama.parameters() if p.dim() == 2]
        sizes = {each.numel() for p in matrices for each in (p, local_block(p)[0])}
        batches = local_batches(batch(0), run.data_rank, case.mesh.dp, case.n_micro)
        with MemoryTraffic(sizes, gathers=case.world == 1) as measured:
            for number, (tokens, positions, labels) in enumerate(batches.micro_batches, start=1):
                with run.fabric.no_backward_sync(run.model, enabled=number < case.n_micro):
                    run.fabric.backward(run.model(tokens, positions, labels))
        spec = StepSpec(
            model=run.llama.config,
            mesh=case.mesh,
            parallel=case.parallel,
            precision=PrecisionConfig(case.param, "fp32"),
            accelerator="cpu",
            seq_len=SEQ,
            global_batch_size=BATCH,
            micro_batch_size=BATCH // case.mesh.dp // case.n_micro,
        )
        rank = RankCosts(spec, load_hardware("cpu"))
        per_micro_batch = rank.weights() if case.world == 1 else rank.elements * rank.sums()
        results.append((measured.bytes, case.n_micro * per_micro_batch))
    return results


TRAFFIC_CASES = [
    Case(param=param, n_micro=n, n_layers=2) for param in ("fp32", "bf16") for n in (1, 3)
]


@pytest.mark.parametrize("reduce_gradients", ["one_process", "step", "micro_batch"])
def test_planned_bytes_of_casts_and_sums_match_a_real_step(reduce_gradients: str) -> None:
    cases = TRAFFIC_CASES
    if reduce_gradients != "one_process":
        cases = [replace(each, dp=2, reduce_gradients=reduce_gradients) for each in TRAFFIC_CASES]
    for measured, planned in on_ranks(cases[0].world, measured_and_planned_bytes, cases)[0]:
        assert measured == pytest.approx(planned, rel=0.02)  # gradients of vectors are not counted


class OneProcess:
    """A device mesh of one process, without a process group."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def __getitem__(self, axis: str) -> "OneProcess":
        return self

    def size(self) -> int:
        return 1

    def get_local_rank(self) -> int:
        return 0


@pytest.mark.parametrize(("device_type", "expected"), [("cuda", ["medium"]), ("cpu", [])])
def test_precision_of_float32_products_is_set_on_gpus_only(
    monkeypatch: pytest.MonkeyPatch, device_type: str, expected: list[str]
) -> None:
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with torch.device("meta"):
        model = Llama(model_config(tied=False, n_layers=1))
    precision = PrecisionConfig(float32_matmul="medium")
    parallelize(model, cast(Any, OneProcess(device_type)), ParallelConfig(), precision)
    assert found == expected
