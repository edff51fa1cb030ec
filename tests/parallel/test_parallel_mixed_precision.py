"""One process without FSDP2: the same weights bit for bit, from copies that live while needed."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from save_checkpoint import save
from small_run import BATCH, OPTIM, SEED, SEQ, STEPS, Case, batch, build, local_batches
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint.position import Position
from checkpoint.restore import load
from model.llama import Llama
from parallel.activation_checkpoint import apply_activation_checkpoint
from parallel.compilation import apply_compile
from parallel.config import PrecisionConfig
from parallel.data_parallel import apply_data_parallel, mixed_precision
from parallel.parallelize import initialize_weights, local_block
from planning.hardware import load_hardware
from planning.job import Job
from planning.speed import _Rank
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


def sharded(model: Llama, mesh: DeviceMesh, case: Case) -> Llama:
    """The plan with FSDP2 around the one shard."""
    if case.activation_checkpoint != "none":
        apply_activation_checkpoint(model, case.activation_checkpoint)
    if case.compile:
        apply_compile(model)
    formats = mixed_precision(PrecisionConfig(param=case.param), "cpu")
    apply_data_parallel(model, mesh, formats, None)
    return model


def differing(cases: dict[str, Case]) -> dict[str, list[str]]:
    """What some steps leave different from what FSDP2 leaves, by case."""
    found = {}
    for name, case in cases.items():
        ends = []
        for plan in (None, partial(sharded, case=case)):
            run = build(case, plan=plan)
            end: dict[str, Tensor] = {}
            for step in range(STEPS):
                batches = local_batches(batch(step), 0, 1, case.n_micro)
                end[f"scalars {step}"] = train_step(cast(Any, run), batches, OPTIM.lr)["scalars"]
            for key, parameter in run.llama.named_parameters():
                state = run.adamw.state[parameter]
                end |= {key: parameter, f"{key} moment": state["exp_avg"]}
            ends.append({key: local_block(tensor.detach())[0] for key, tensor in end.items()})
        own, reference = ends
        assert own.keys() == reference.keys()
        found[name] = [key for key in own if not torch.equal(own[key], reference[key])]
    return found


def test_steps_are_those_of_fsdp2_bit_for_bit() -> None:
    assert on_ranks(1, differing, CASES)[0] == {name: [] for name in CASES}


class Casts(TorchDispatchMode):
    """Counts how often each tensor is the source of a copy into another format."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.sources += [source.data_ptr() for source in args[1]]
        return func(*args, **(kwargs or {}))


def lives_of_copies() -> dict[str, Any]:
    """Formats and memory of what the modules hold, at moments of a step of two micro-batches."""
    run = build(Case(n_layers=2, param="bf16", tied=True))
    llama, masters = run.llama, list(run.llama.parameters())
    found: dict[str, Any] = {"masters": len(masters)}
    seen: list[nn.Parameter] = []

    def look(*_: Any) -> None:
        seen[:] = llama.parameters()

    def state() -> tuple[set[int], bool]:
        """Bytes of the copies, by their number of elements; whether the masters are back."""
        held = {p.untyped_storage().nbytes() // p.numel() for p in seen}
        return held, all(a is b for a, b in zip(llama.parameters(), masters, strict=True))

    llama.loss.register_forward_pre_hook(look)
    first, last = local_batches(batch(0), 0, 1, 2).micro_batches
    with Casts() as casts:
        with run.fabric.no_backward_sync(run.model, enabled=True):
            loss = run.model(*first)
            found["forward"] = {p.dtype for p in seen}, state()
            run.fabric.backward(loss)
            found["first"] = state()
        run.fabric.backward(run.model(*last))
        found["last"] = state()
    found["casts"] = sorted(casts.sources) == sorted(p.data_ptr() for p in masters)
    found["gradients"] = {p.grad.dtype for p in masters if p.grad is not None}
    return found


def test_copies_are_made_once_a_step_and_give_their_memory_back_with_the_last_gradients() -> None:
    found = on_ranks(1, lives_of_copies)[0]
    assert found["forward"] == ({torch.bfloat16}, ({2}, False))
    assert found["first"] == ({2}, True)
    assert found["last"] == ({0}, True)
    assert found["casts"] and found["masters"] == 20  # nine a block, two around: no copy is twice
    assert found["gradients"] == {torch.float32}


def unseen_writes(folder: Path) -> list[str]:
    """After which way of writing to the weights a forward still computes with those before."""
    case = Case(n_layers=2, param="bf16")
    run, fresh = build(case), build(case)
    tokens, positions, labels = local_batches(batch(0), 0, 1, 1).micro_batches[0]
    save(RunFolder(folder), run.llama, run.adamw, Position(1, 0, 0, "of the test"), {})
    narrow = build_optimizer(run.llama, OPTIM, "int8")

    def logits(llama: Llama) -> Tensor:
        with torch.no_grad():
            return llama(tokens, positions)

    writes = {
        "optimizer": run.adamw.step,
        "restoring": lambda: load(RunFolder(folder).step_folder(1), run.llama, run.adamw),
        "8-bit optimizer": narrow.step,
        "initial weights": lambda: initialize_weights(run.llama, run.llama.config, SEED + 1),
    }
    found = []
    for name, write in writes.items():
        run.fabric.backward(run.model(tokens, positions, labels))
        before = logits(run.llama)  # there are copies now
        write()
        fresh.llama.load_state_dict(run.llama.state_dict())
        after = logits(run.llama)
        if torch.equal(before, after) or not torch.equal(after, logits(fresh.llama)):
            found.append(name)
    return found


def test_whoever_writes_to_the_weights_the_next_forward_knows(tmp_path: Path) -> None:
    assert on_ranks(1, unseen_writes, tmp_path)[0] == []


def parameters_after_failure() -> set[torch.dtype]:
    run = build(Case(param="bf16"))
    with torch.no_grad(), pytest.raises(IndexError):
        run.model(torch.full((1, 4), run.llama.config.vocab_size))
    return {parameter.dtype for parameter in run.llama.parameters()}


def test_a_forward_that_fails_leaves_the_parameters_as_they_were() -> None:
    assert on_ranks(1, parameters_after_failure)[0] == {torch.float32}


class Moved(TorchDispatchMode):
    """Adds up the bytes that casts and sums of matrices of weights or gradients read and write."""

    def __init__(self, sizes: set[int], gathers: bool) -> None:
        super().__init__()
        self.sizes, self.gathers, self.bytes = sizes, gathers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._foreach_copy_.default and self.gathers:
            self.bytes += sum(t.nbytes for part in args[:2] for t in part)
        elif func is torch.ops.aten._to_copy.default and args[0].numel() in self.sizes:
            self.bytes += args[0].nbytes + out.nbytes
        elif func is torch.ops.fsdp.chunk_cat.default:  # into the buffer that is reduced
            self.bytes += sum(t.nbytes for t in args[0]) + kwargs["out"].nbytes
        elif func is torch.ops.aten.add_.Tensor and args[0].numel() in self.sizes:
            self.bytes += 2 * args[0].nbytes + args[1].nbytes
        return out


def moved_and_planned(cases: list[Case]) -> list[tuple[float, float]]:
    """Bytes of a step by the operations that are seen, and by the closed form of speed.

    On a mesh, of gradients alone: what FSDP2 gathers is moved in other ways too.
    """
    found = []
    for case in cases:
        run = build(case)
        matrices = [p for p in run.llama.parameters() if p.dim() == 2]
        sizes = {each.numel() for p in matrices for each in (p, local_block(p)[0])}
        batches = local_batches(batch(0), run.data_rank, case.mesh.dp, case.n_micro)
        with Moved(sizes, gathers=case.world == 1) as moved:
            for place, (tokens, positions, labels) in enumerate(batches.micro_batches, start=1):
                with run.fabric.no_backward_sync(run.model, enabled=place < case.n_micro):
                    run.fabric.backward(run.model(tokens, positions, labels))
        job = Job(
            model=run.llama.config,
            mesh=case.mesh,
            parallel=case.parallel,
            precision=PrecisionConfig(case.param, "fp32"),
            accelerator="cpu",
            seq_len=SEQ,
            global_batch_size=BATCH,
            micro_batch_size=BATCH // case.mesh.dp // case.n_micro,
        )
        rank = _Rank(job, load_hardware("cpu"))
        form = rank.weights() if case.world == 1 else rank.elements * rank.sums()
        found.append((moved.bytes, case.n_micro * form))  # the form is of a micro-batch
    return found


MOVING = [Case(param=param, n_micro=n, n_layers=2) for param in ("fp32", "bf16") for n in (1, 3)]


@pytest.mark.parametrize("reduce_gradients", ["alone", "step", "micro_batch"])
def test_planned_bytes_of_casts_and_sums_are_those_of_a_step(reduce_gradients: str) -> None:
    cases = MOVING
    if reduce_gradients != "alone":
        cases = [replace(each, dp=2, reduce_gradients=reduce_gradients) for each in MOVING]
    for moved, planned in on_ranks(cases[0].world, moved_and_planned, cases)[0]:
        assert moved == pytest.approx(planned, rel=0.02)  # vectors' gradients are left out
