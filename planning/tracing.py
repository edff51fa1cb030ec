"""Peak memory of a rank, measured tensor by tensor on fake tensors.

Runs two steps of the real `parallelize`, FSDP2 and autograd for rank 0 of a fake process group; the
second is measured. The model is not compiled: where the run compiles it, or the GPU has a fused
kernel that CPUs lack, an operation that saves the same tensors replaces it. Deep models are traced
at two depths and each phase is extrapolated linearly.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention import AttentionKernel, Mask
from model.llama import FeedForward, Llama
from model.loss import BLOCK
from model.norm import RMSNorm
from parallel.activation_checkpoint import is_saved
from parallel.gradients import clip_grad_norm
from parallel.step_scalars import N_EXTRA_SCALARS
from parallel.trace import materialise, traced_model
from planning.activations import (
    HALF_BUDGET,
    block_saved_bytes,
    full_hidden_bytes,
    uses_sequence_parallel,
)
from planning.memory import MOMENT_BLOCK, MOMENT_CHUNK, MemoryBreakdown
from planning.memory_tracker import MemoryTracker
from planning.step_spec import StepSpec

DEPTHS = (4, 6)  # at least 4: the first two and last two blocks differ from the rest

# Tracker category: field of `MemoryBreakdown`. Other categories are temporary.
_FIELDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "forward": "activations",
    "inputs": "activations",
    "gathered_weights": "gathered",
    "gathered_gradients": "gathered",
    "collectives": "gathered",
    "unreduced": "gathered",
    "logits": "logits",
}

Peaks = dict[str, dict[str, float]]
"""Bytes by category at the peak of each phase."""


def trace_memory(spec: StepSpec) -> MemoryBreakdown:
    """Return the peak memory of rank 0 in a step. Takes seconds."""
    budget = spec.parallel.activation_checkpoint
    if not isinstance(budget, float):
        return _breakdown(spec, _extrapolated_peaks(spec))
    if budget >= HALF_BUDGET:  # recomputation behaves as if all matrix products were saved
        reference = _with_checkpoint(spec, "none" if budget == 1 else "selective")
        peaks = _extrapolated_peaks(reference)
        difference = block_saved_bytes(spec) - block_saved_bytes(reference)
        all_saved = peaks["head"]["forward"]
        for held in peaks.values():
            alive = held.get("forward", 0)
            held["forward"] = alive + spec.model.n_layers * difference * min(alive / all_saved, 1)
        return _breakdown(spec, peaks)
    full, none = _with_checkpoint(spec, "full"), _with_checkpoint(spec, "none")
    least, saved, most = (block_saved_bytes(each) for each in (full, spec, none))
    weight = (saved - least) / (most - least)
    return _breakdown(
        spec, _interpolate(_extrapolated_peaks(full), _extrapolated_peaks(none), weight)
    )


def _with_checkpoint(spec: StepSpec, mode: Literal["full", "selective", "none"]) -> StepSpec:
    parallel = dataclasses.replace(spec.parallel, activation_checkpoint=mode)
    return dataclasses.replace(spec, parallel=parallel)


def _extrapolated_peaks(spec: StepSpec) -> Peaks:
    """Return `_peaks`, extrapolated from two depths if the model is deeper."""
    layers = spec.model.n_layers
    if layers <= DEPTHS[-1]:
        return _peaks(spec)
    shallow, deep = (
        _peaks(dataclasses.replace(spec, model=dataclasses.replace(spec.model, n_layers=depth)))
        for depth in DEPTHS
    )
    return _interpolate(shallow, deep, (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def _interpolate(first: Peaks, second: Peaks, weight: float) -> Peaks:
    """Return first + weight × (second - first), per phase and category."""
    return {
        phase: {
            name: a.get(name, 0) + weight * (second[phase].get(name, 0) - a.get(name, 0))
            for name in second[phase].keys() | a.keys()
        }
        for phase, a in first.items()
    }


def _breakdown(spec: StepSpec, peaks: Peaks) -> MemoryBreakdown:
    """Return the breakdown of the phase with the highest peak."""
    rows = min(spec.step.head_chunk, spec.local_tokens)
    vocab = spec.model.vocab_size // (spec.mesh.tp if spec.parallel.loss_parallel else 1)
    logits = rows * vocab * spec.param_bytes
    phase, held = max(peaks.items(), key=lambda item: sum(item[1].values()))
    held = dict(held)
    held["logits"] = min(logits, held.get("head", 0))
    held["head"] = held.get("head", 0) - held["logits"]
    parts: dict[str, int] = {}
    for category, size in held.items():
        part = _FIELDS.get(category, "temporary")
        parts[part] = parts.get(part, 0) + round(size)
    return MemoryBreakdown(**parts, phase=phase)


def _peaks(spec: StepSpec) -> Peaks:
    """Return bytes by category at the peak of each phase of the second step."""
    # FSDP2 uses the namespace c10d; tensors received by tensor and context parallelism use the
    # functional one and count as activations.
    tracker = MemoryTracker({}, fake=True, collective_namespaces=("c10d",))
    precision = dataclasses.replace(spec.precision, fp8=None)
    parallel, lazy = spec.parallel, _recomputes_lazily(spec)
    if lazy:
        parallel = dataclasses.replace(parallel, activation_checkpoint="none")
    prepare = partial(_use_gpu_attention, spec)
    with (
        traced_model(spec.model, spec.mesh, parallel, precision, prepare) as (llama, strategy),
        tracker,
    ):
        materialise(llama)
        if spec.accelerator == "cuda" or spec.parallel.compile:
            _replace_fused(llama, spec)
        if lazy:
            for block in llama.layers:
                setattr(block, "forward", partial(_lazy_forward, block.forward))  # noqa: B010
        _set_phases(llama, tracker)
        optimizer = FakeAdamW(llama, spec.precision.optimizer_state, spec.accelerator)
        tracker.model, tracker.optimizer = llama, cast(Any, optimizer)
        for _ in range(2):
            tracker.peaks.clear()
            _step(llama, strategy, optimizer, tracker, spec)
    return cast(Peaks, dict(tracker.peaks))


def _step(
    llama: Any, strategy: Any, optimizer: "FakeAdamW", tracker: MemoryTracker, spec: StepSpec
) -> None:
    """Run the operations of `train_step` on uninitialized tokens, with at most 2 micro-batches."""
    micro_batches = min(spec.micro_batches, 2)
    for i in range(1, micro_batches + 1):
        tracker.phase = "inputs"
        tokens = torch.empty(spec.micro_batch_size, spec.seq_len, dtype=torch.int64)  # (batch, seq)
        positions = torch.empty_like(tokens) if spec.document_mask else None
        labels = torch.empty_like(tokens)
        tracker.phase = "forward"
        with strategy.micro_batch_sync.no_backward_sync(llama, i < micro_batches):
            loss = llama(tokens, positions, labels)  # hooks set the phases from here on
            loss.backward()
        del loss
        if i < micro_batches:
            tracker.rename("unreduced")  # only unreduced gradients are still alive
    tracker.phase = "update"
    clip_grad_norm(llama, max_norm=1.0, extra_scalars=torch.empty(N_EXTRA_SCALARS))
    optimizer.step()
    for parameter in llama.parameters():
        parameter.grad = None


def _set_phases(llama: Llama, tracker: MemoryTracker) -> None:
    """Install hooks that set the tracker's phase at the head and at each block's backward."""
    last = len(llama.layers) - 1
    names = {-1: "embedding", 0: "first block", 1: "second block"}
    names |= {last: "last block", last - 1: "last block but one"}

    def set_phase(phase: str) -> None:
        tracker.phase = phase

    llama.loss.register_forward_pre_hook(lambda *_: set_phase("head"))
    llama.loss.register_forward_hook(lambda *_: set_phase(names[last]))
    for index, block in enumerate(llama.layers):
        previous = names.get(index - 1, "a block")

        def hook(_: Any, arguments: tuple[Tensor, ...], previous: str = previous) -> None:
            if arguments[0].requires_grad:  # its gradient is computed last in this block's backward
                arguments[0].register_hook(lambda _: set_phase(previous))

        block.register_forward_pre_hook(hook)


class FakeAdamW:
    """Allocate what AdamW allocates, without computing anything.

    The moments of each parameter's local shard are created by the first step. A test compares the
    sizes with `training.optimizer`.

    Args:
        state: `precision.optimizer_state`; vectors use float32.
    """

    def __init__(self, model: nn.Module, state: str, accelerator: str) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
        self.format, self.chunk = state, MOMENT_CHUNK[accelerator]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self) -> None:
        """Allocate the moments, and float32 chunks of low-precision ones."""
        for parameter in self.param_groups[0]["params"]:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter not in self.state:
                self.state[parameter] = self._new_moments(local)
            if self.format != "fp32" and local.ndim >= 2:
                chunk = min(self.chunk, local.numel())
                for _ in range(2):
                    widened = [torch.empty(chunk) for _ in range(2)]
                del widened

    def _new_moments(self, local: Tensor) -> dict[str, Tensor]:
        state_format = self.format if local.ndim >= 2 else "fp32"
        moments = {}
        for name in ("exp_avg", "exp_avg_sq"):
            if state_format == "int8":
                blocks = -(-local.numel() // MOMENT_BLOCK)
                moments[name] = torch.empty(blocks, MOMENT_BLOCK, dtype=torch.uint8)
                moments[f"{name} scales"] = torch.empty(blocks)
            else:
                dtype = torch.bfloat16 if state_format == "bf16" else torch.float32
                moments[name] = torch.empty(local.shape, dtype=dtype)
        return moments


# ---------------------------------------------------------------- replacements of fused kernels


def _use_gpu_attention(spec: StepSpec, llama: Llama) -> None:
    """Use an attention kernel without a dense mask on GPUs, where all kernels save the same."""
    if spec.accelerator == "cuda":
        llama.kernel = _MasklessKernel("sdpa")
        for block in llama.layers:
            cast(Any, block).attention.kernel = llama.kernel


class _MasklessKernel(AttentionKernel):
    """Causal attention that saves queries, keys, values, output and log-sum-exp."""

    def mask(self, *_: Any, **__: Any) -> Mask:
        return None


def _replace_fused(llama: Any, spec: StepSpec) -> None:
    """Replace modules that are one kernel on GPUs or when compiled by a single operation."""
    llama.loss.block = {"cpu": BLOCK[spec.accelerator]}
    for module in llama.modules():
        if isinstance(module, RMSNorm):
            if spec.accelerator == "cuda" or module is not llama.norm:  # the last is not compiled
                setattr(module, "forward", partial(_norm, module))  # noqa: B010
        elif spec.parallel.compile and isinstance(module, FeedForward):
            recompute = spec.parallel.activation_checkpoint != "none"
            pending = 0
            if recompute and uses_sequence_parallel(spec):
                pending = full_hidden_bytes(spec)
            forward = partial(_feed_forward, module, recompute, pending)
            setattr(module, "forward", forward)  # noqa: B010
    if spec.parallel.compile:
        llama.loss.compiled = True
        llama.loss.sum_exponentials = lambda logits, maximum: maximum.clone()
        llama.loss.exponentiate_ = lambda logits, maximum, factor: None


def _norm(module: Any, x: Tensor) -> Tensor:
    return cast(Tensor, _FusedNorm.apply(x, module.weight))


def _feed_forward(module: Any, recompute: bool, pending: int, x: Tensor) -> Tensor:
    return module.w2(_FusedSwiGLU.apply(module.w1(x), module.w3(x), recompute, pending))


class _FusedNorm(torch.autograd.Function):
    """Saves its input, the weight and one value per token. The output is meaningless."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _, weight, _ = ctx.saved_tensors
        return grad * weight, torch.empty_like(weight)


class _FusedSwiGLU(torch.autograd.Function):
    """Saves its two inputs and recomputes silu.

    With `recompute`, the compiler recomputes the output in the kernel of the gradients. Until then
    `pending` bytes are alive in addition: the output gradient needed for the weight gradient of w2.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, recompute: bool, pending: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.recompute, ctx.pending = recompute, pending
        return gate * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        pending = torch.empty(ctx.pending, dtype=torch.uint8)
        output = gate * up if ctx.recompute else None
        gradients = grad * up, grad * gate
        del output, pending  # alive until both gradients exist
        return *gradients, None, None


# ---------------------------------------------------------------- recomputation by the compiler


def _recomputes_lazily(spec: StepSpec) -> bool:
    """Return whether the compiler recomputes each tensor on demand (selective checkpointing)."""
    return spec.parallel.compile and spec.parallel.activation_checkpoint == "selective"


def _lazy_forward(forward: Any, *arguments: Any) -> Tensor:
    """Run a block whose backward allocates, on demand, what `_SavedResults` did not save."""
    saved = _SavedResults()
    with saved, saved_tensors_hooks(saved.pack, _unpack):
        out = forward(*arguments)
    saved.results.pop()  # the output of w2, which no gradient needs
    return cast(Tensor, out)


class _SavedResults(TorchDispatchMode):
    """Hold the results of matrix products and attention until the block's backward is done."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []
        self.recomputable: set[int] = set()  # storages of all other results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # redispatched as local operations, which are handled here
        out = func(*args, **(kwargs or {}))
        if is_saved(func):
            if func.namespace == "_c10d_functional":
                self.results.pop()  # the tensor-parallel sum replaces the local partial result
            self.results.append(out)
            self.recomputable -= _storages(out)  # a freed storage may have had the same address
        else:
            self.recomputable |= _storages(out) - _storages((args, kwargs))  # views excluded
        return out

    def pack(self, saved: Tensor) -> Any:
        """Return the saved tensor, or a function that allocates one of its size."""
        if not _storages(saved) & self.recomputable:
            return saved
        local = saved.to_local() if isinstance(saved, DTensor) else saved
        allocate = partial(torch.empty_strided, local.shape, local.stride(), dtype=local.dtype)
        # `self` keeps the results alive as long as the graph.
        return self, allocate, (saved._spec if isinstance(saved, DTensor) else None)


def _storages(tree: Any) -> set[int]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    local = [t.elem if isinstance(t, AsyncCollectiveTensor) else t for t in local]
    return {t.untyped_storage()._cdata for t in local}


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    _, allocate, spec = packed
    return allocate() if spec is None else DTensor(allocate(), spec, requires_grad=False)
