"""Peak memory of a rank, measured tensor by tensor on fake tensors.

Runs a step of the real `parallelize`, FSDP2 and autograd for rank 0 of a fake process group, with
the moments of an earlier step. The model is not compiled: where the run compiles it, or the GPU has
a fused kernel that CPUs lack, an operation that saves the same tensors replaces it. Deep models are
traced at two depths and each phase is extrapolated linearly.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
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
from parallel.pipeline_schedule import Action, Transfer, max_in_flight
from parallel.strategy import MeshStrategy
from planning.activations import full_hidden_bytes, uses_sequence_parallel
from planning.allocations import MOMENT_CHUNK
from planning.fake_model import fake_model, materialise
from planning.memory import MemoryBreakdown, different_stages, with_host_memory
from planning.memory_tracker import MemoryTracker, local_tensor
from planning.phases import PARTS, Held, Peaks, fullest_phase, interpolate
from planning.pipeline_step import replayed_micro_batches
from planning.sharded_step import first_kept_block
from planning.step_spec import MOMENT_BLOCK, StepSpec

DEPTHS = (4, 5)  # at least 4: the first two and last two blocks differ from the rest
IN_FLIGHT = (3, 4)  # at least 3: the first and the last micro-batch differ from the rest
EMBEDDING, MIDDLE = "embedding", "a block"  # phases of the backward
ENDS = ("first block", "second block", "last block but one", "last block")

# Tracker category: field of `MemoryBreakdown` where the names differ. Others are temporary.
_GATHERED = ("gathered_weights", "gathered_gradients", "collectives", "unreduced")
_FIELDS = {part: part for part in PARTS} | {"inputs": "activations"}
_FIELDS |= dict.fromkeys(_GATHERED, "gathered")


def trace_memory(spec: StepSpec) -> MemoryBreakdown:
    """Return the peak memory of rank 0 in a step, or in a pipeline that of the fullest rank.

    Takes seconds; with interleaved parts on many pipeline ranks, minutes.
    """
    return max(map(trace_stage_memory, different_stages(spec)), key=lambda memory: memory.peak)


def trace_stage_memory(spec: StepSpec) -> MemoryBreakdown:
    """Return the peak memory of the first process of the pipeline rank `spec.stage` in a step."""
    return _breakdown(spec, *fullest_phase(spec, traced_peaks))


def traced_peaks(spec: StepSpec) -> Peaks:
    """Return the peaks by phase, extrapolated from two depths if the model is deeper."""
    if spec.mesh.pp > 1:
        peaks = _extrapolated_pipeline(spec)
    elif spec.model.n_layers <= DEPTHS[-1]:
        peaks = _peaks(spec)
    else:
        shallow, deep = (
            _peaks(replace(spec, model=replace(spec.model, n_layers=depth))) for depth in DEPTHS
        )
        weight = (spec.model.n_layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        peaks = _extrapolated(shallow, deep, weight)
    return _with_fp8_gathers(spec, _fullest_micro_batches(peaks))


def _extrapolated(shallow: list[Peaks], deep: list[Peaks], weight: float) -> list[Peaks]:
    return [interpolate(*each, weight) for each in zip(shallow, deep, strict=True)]


def _extrapolated_pipeline(spec: StepSpec) -> list[Peaks]:
    """Return the peaks of each computation, extrapolated from two depths of each part.

    Without interleaving also from two numbers of micro-batches in flight.
    """
    depths = [len(part.layers) for part in spec.parts]
    ahead = max_in_flight(spec.stage, spec.mesh.pp, len(depths), spec.micro_batches)
    return _extrapolated_depths(spec, depths, ahead)


def _extrapolated_depths(spec: StepSpec, depths: list[int], in_flight: int) -> list[Peaks]:
    """Extrapolate one of the numbers that is too large to trace, and the others recursively."""
    for depth in depths:
        if depth > DEPTHS[1]:
            shallow, deep = (
                _extrapolated_depths(
                    spec, [less if each == depth else each for each in depths], in_flight
                )
                for less in DEPTHS
            )
            return _extrapolated(shallow, deep, (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))
    if len(depths) == 1 and in_flight > IN_FLIGHT[1]:
        few, more = (_extrapolated_depths(spec, depths, number) for number in IN_FLIGHT)
        # Of the forwards before the first backward, and of the backwards after the last forward,
        # the first and the last are the fullest; the others have no counterpart.
        del more[IN_FLIGHT[0]], more[-IN_FLIGHT[0]]
        weight = (in_flight - IN_FLIGHT[0]) / (IN_FLIGHT[1] - IN_FLIGHT[0])
        return _extrapolated(few, more, weight)
    return _peaks(_like_stage(spec, depths, in_flight))


def _like_stage(spec: StepSpec, depths: list[int], in_flight: int) -> StepSpec:
    """Return the step on a pipeline rank with the same ends of the model as `spec.stage`.

    Args:
        depths: Number of layers of each part.
        in_flight: Micro-batches in flight, unless parts are interleaved.
    """
    ranks, stage, micro_batches = spec.mesh.pp, spec.stage, spec.micro_batches
    if len(depths) == 1:
        micro_batches -= max_in_flight(stage, ranks, 1, micro_batches) - in_flight
        stage = 1 if stage else 0
        ranks = 2 if spec.has_head else stage + max(in_flight, 2)
    layers = [1] * (ranks * len(depths))
    layers[stage::ranks] = depths
    return replace(
        spec,
        model=replace(spec.model, n_layers=sum(layers)),
        mesh=replace(spec.mesh, pp=ranks),
        parallel=replace(spec.parallel, pp=ranks, pp_layers=tuple(layers)),
        stage=stage,
        global_batch_size=spec.micro_batch_size * spec.mesh.dp * micro_batches,
    )


def _fullest_micro_batches(peaks: list[Peaks]) -> Peaks:
    """Return the highest peak of each phase over the micro-batches."""
    phases = {phase: None for each in peaks for phase in each}
    return {
        phase: max((each.get(phase, {}) for each in peaks), key=lambda held: sum(held.values()))
        for phase in phases
    }


def _with_fp8_gathers(spec: StepSpec, peaks: Peaks) -> Peaks:
    """Return the peaks with one byte per weight in the blocks that stay gathered, under fp8.

    They were traced in `precision.param`, like the one or two blocks gathered for their products.
    """
    matrices = sum(rows * columns for rows, columns in spec.fp8_gathered)
    layers = spec.n_layers
    kept = layers - first_kept_block(spec)
    at_end = {"last block but one": 1, "second block": layers - 2, "first block": layers - 1}
    for phase, held in peaks.items():
        # Between micro-batches they stay gathered.
        freed = 0 if spec.micro_batches > 1 else at_end.get(phase, 0)
        if phase not in ("update", "inputs") and (spec.micro_batches > 1 or phase != "embedding"):
            saved = max(0, kept - freed) * matrices * (spec.param_bytes - 1)
            held["gathered"] = held.get("gathered", 0) - saved
    return peaks


def _breakdown(spec: StepSpec, phase: str, held: Held) -> MemoryBreakdown:
    rows = min(spec.step.head_chunk, spec.local_tokens)
    vocab = spec.model.vocab_size // (spec.mesh.tp if spec.parallel.loss_parallel else 1)
    logits = rows * vocab * spec.param_bytes
    in_head = held.get("head", 0)
    held = held | {"logits": min(logits, in_head), "head": max(0, in_head - logits)}
    parts: Counter[str] = Counter()
    for category, size in held.items():
        parts[_FIELDS.get(category, "temporary")] += round(size)
    return with_host_memory(spec, MemoryBreakdown(**parts, phase=phase, stage=spec.stage))


def _peaks(spec: StepSpec) -> list[Peaks]:
    """Return bytes by category at the peak of each phase of each micro-batch of a step.

    Runs the operations of `train_step` on uninitialized tokens, with at most 3 micro-batches: the
    second one adds to the gradients of the first and keeps weights, the third one reduces.
    """
    # FSDP2 uses the namespace c10d; tensors received by tensor and context parallelism use the
    # functional one and count as activations.
    on_cpu = spec.accelerator == "cpu"
    tracker = MemoryTracker(fake=True, collective_namespaces=("c10d",), on_cpu=on_cpu)
    precision = replace(spec.precision, fp8=None)
    # The compiler recomputes each tensor on demand in selective checkpointing.
    lazy = spec.parallel.compile and spec.parallel.activation_checkpoint == "selective"
    parallel = replace(spec.parallel, pp_checkpoint=None)
    if lazy:
        parallel = replace(parallel, activation_checkpoint="none")
    with (
        fake_model(
            spec.model,
            spec.mesh,
            parallel,
            precision,
            partial(_use_gpu_attention, spec),
            stage=spec.stage,
        ) as (llama, strategy),
        _without_shape_propagation(tracker),
        tracker,
    ):
        materialise(llama)
        _replace_passes_over_logits(llama.loss, spec)
        if spec.accelerator == "cuda" or spec.parallel.compile:
            _replace_fused(llama, spec)
        if lazy:
            for block in llama.layers:
                setattr(block, "forward", partial(_lazy_forward, block.forward))  # noqa: B010
        _set_phases(llama, tracker)
        optimizer = FakeAdamW(llama, spec.precision.optimizer_state, spec.accelerator)
        tracker.model, tracker.optimizer = llama, cast(Any, optimizer)
        tracker.peaks.clear()
        peaks: list[Peaks] = []

        def record() -> None:
            peaks.append(cast(Peaks, dict(tracker.peaks)))
            tracker.peaks.clear()

        run = _run_pipeline if strategy.pipeline is not None else _run_micro_batches
        run(spec, llama, strategy, tracker, record)
        tracker.phase = "update"
        optimizer.step()
        record()
    for held in chain.from_iterable(each.values() for each in peaks):
        held["activations"] = held.pop("forward", 0)
    return peaks


def _run_micro_batches(
    spec: StepSpec,
    llama: Any,
    strategy: MeshStrategy,
    tracker: MemoryTracker,
    record: Callable[[], None],
) -> None:
    """Run at most 3 micro-batches, and call `record` after each.

    The second one adds to the gradients of the first and keeps weights, the third one reduces.
    """
    micro_batches = min(spec.micro_batches, 3)
    for i in range(1, micro_batches + 1):
        tokens, positions, labels = _batch(spec, tracker)
        with strategy.micro_batch_sync.no_backward_sync(llama, i < micro_batches):
            loss = llama(tokens, positions, labels)  # hooks set the phases from here on
            loss.backward()
        del loss
        if i < micro_batches:
            tracker.rename("unreduced")  # only unreduced gradients are still alive
        record()


def _run_pipeline(
    spec: StepSpec,
    llama: Any,
    strategy: MeshStrategy,
    tracker: MemoryTracker,
    record: Callable[[], None],
) -> None:
    """Run the micro-batches of a pipeline rank, and call `record` before each computation."""
    pipeline = strategy.pipeline
    prepare_backward, links = pipeline._prepare_backward, pipeline.links
    receive, received = links.receive, links.received

    def start(phase: str) -> None:
        tracker.rename("unreduced", (EMBEDDING, MIDDLE, *ENDS))  # and the gradient that is sent
        record()
        tracker.phase = phase

    def start_backward(actions: Sequence[Action]) -> None:
        names = _phase_names(len(llama.parts[actions[0].part].layers))
        start(names[-1])
        prepare_backward(actions)

    def start_receive(transfer: Transfer, shape: Sequence[int]) -> None:
        tracker.phase, phase = "forward" if transfer.forward else "received", tracker.phase
        receive(transfer, shape)
        tracker.phase = phase

    def finish_receive(transfer: Transfer) -> Tensor:
        values = received(transfer)
        if not transfer.forward:  # the runtime holds it during the backward
            tracker.shared[values.untyped_storage()] = True
        return values

    def to_device(batch: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        start("inputs")
        return _batch(spec, tracker)

    pipeline._prepare_backward = start_backward
    links.receive, links.received = start_receive, finish_receive
    tokens = torch.empty(spec.micro_batch_size, spec.seq_len, dtype=torch.int64, device="meta")
    micro_batches = [((tokens,), 0)] * replayed_micro_batches(spec)
    losses = strategy.accumulate(llama, micro_batches, to_device, torch.empty((), device="meta"))
    del losses
    record()


def _batch(spec: StepSpec, tracker: MemoryTracker) -> tuple[Tensor, Tensor | None, Tensor]:
    """Allocate tokens, positions and labels of a micro-batch, each (batch, seq)."""
    tracker.phase = "inputs"
    tokens = torch.empty(spec.micro_batch_size, spec.seq_len, dtype=torch.int64)
    positions = torch.empty_like(tokens) if spec.document_mask else None
    labels = torch.empty_like(tokens)
    tracker.phase = "forward"
    return tokens, positions, labels


@contextmanager
def _without_shape_propagation(tracker: MemoryTracker) -> Iterator[None]:
    """Pause the tracker while DTensor runs an operator on tensors of global shape for its result's.

    In a real process these are fake tensors.
    """
    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    method = propagator._propagate_tensor_meta_non_cached

    def paused(op_schema: Any) -> Any:
        tracker.paused = True
        try:
            return method(op_schema)
        finally:
            tracker.paused = False

    propagator._propagate_tensor_meta_non_cached = paused
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = method


def _set_phases(llama: Llama, tracker: MemoryTracker) -> None:
    """Install hooks that set the tracker's phase at the head and at each block's backward."""

    def set_phase(phase: str) -> Callable[..., None]:
        return lambda *_: setattr(tracker, "phase", phase)

    for part in llama.parts:
        names = _phase_names(len(part.layers))
        for layer, previous in zip(part.layers, [EMBEDDING, *names], strict=False):

            def hook(_: Any, arguments: Any, previous: str = previous) -> None:
                if arguments[0].requires_grad:  # its gradient is computed last in the backward
                    arguments[0].register_hook(set_phase(previous))

            llama.layers.get_submodule(str(layer)).register_forward_pre_hook(hook)
        if part.has_head:
            llama.loss.register_forward_pre_hook(set_phase("head"))
            llama.loss.register_forward_hook(set_phase(names[-1]))


def _phase_names(n_layers: int) -> list[str]:
    """Return the phase of the backward of each layer of a part; without layers that of the head."""
    names = [MIDDLE] * n_layers
    for index, name in zip((0, 1, n_layers - 2, n_layers - 1), ENDS, strict=True):
        if 0 <= index < n_layers:
            names[index] = name
    return names or [ENDS[-1]]


class FakeAdamW:
    """Allocate what AdamW allocates, without computing anything.

    The moments of each parameter's local shard exist from the start, as after a first step. A test
    compares the sizes with `training.optimizer`.

    Args:
        state: `precision.optimizer_state`; vectors use float32.
    """

    def __init__(self, model: nn.Module, state: str, accelerator: str) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
        self.format, self.chunk = state, MOMENT_CHUNK[accelerator]
        self.state = {each: self._moments(local_tensor(each)) for each in model.parameters()}

    def _moments(self, local: Tensor) -> dict[str, Tensor]:
        state_format = self._format_of(local)
        dtype = torch.bfloat16 if state_format == "bf16" else torch.float32
        sizes = {"": (local.shape, dtype)}
        if state_format == "int8":
            blocks = -(-local.numel() // MOMENT_BLOCK)
            values = torch.Size([blocks, MOMENT_BLOCK])
            sizes = {"": (values, torch.uint8), " scales": (values[:1], torch.float32)}
        return {
            f"{moment}{name}": torch.empty(shape, dtype=dtype)
            for moment in ("exp_avg", "exp_avg_sq")
            for name, (shape, dtype) in sizes.items()
        }

    def _format_of(self, local: Tensor) -> str:
        return self.format if local.ndim >= 2 else "fp32"

    def step(self) -> None:
        """Allocate the float32 chunks of low-precision moments."""
        for parameter in self.param_groups[0]["params"]:
            local = local_tensor(parameter)
            if self._format_of(local) != "fp32":
                chunk = min(self.chunk, local.numel())
                for _ in range(2):
                    widened = [torch.empty(chunk) for _ in range(2)]
                del widened


# ---------------------------------------------------------------- replacements of fused kernels


def _use_gpu_attention(spec: StepSpec, llama: Llama) -> None:
    """Use an attention kernel that saves what the one on a GPU saves."""
    if spec.accelerator == "cuda":
        llama.kernel = AttentionKernel("sdpa") if spec.has_dense_mask else _MasklessKernel("sdpa")
        if spec.expanded_kv_heads != spec.model.n_kv_heads and not spec.parallel.compile:
            llama.kernel.sdpa = _sdpa_of_expanded_heads
        for block in llama.layers:
            cast(Any, block).attention.kernel = llama.kernel


def _sdpa_of_expanded_heads(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Attention of (batch, heads, seq, head_dim) that saves a copy of each key-value head."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class _MasklessKernel(AttentionKernel):
    """Causal attention that saves queries, keys, values, output and log-sum-exp."""

    def mask(self, *_: Any, **__: Any) -> Mask:
        return None


def _replace_fused(llama: Any, spec: StepSpec) -> None:
    """Replace modules that are one kernel on GPUs or when compiled by a single operation."""
    for module in llama.modules():
        if isinstance(module, RMSNorm):
            is_last = module is getattr(llama, "norm", None)  # which is not compiled
            if spec.accelerator == "cuda" or not is_last:
                setattr(module, "forward", partial(_norm, module))  # noqa: B010
        elif spec.parallel.compile and isinstance(module, FeedForward):
            recompute = spec.parallel.activation_checkpoint != "none"
            alive = recompute and uses_sequence_parallel(spec)
            pending = full_hidden_bytes(spec) if alive else 0
            forward = partial(_feed_forward, module, recompute, pending)
            setattr(module, "forward", forward)  # noqa: B010


def _replace_passes_over_logits(loss: Any, spec: StepSpec) -> None:
    """Replace the passes by blocks, which may be thousands, by one with the memory of a block."""
    block = BLOCK[spec.accelerator]

    def sum_exponentials(logits: Tensor, maximum: Tensor) -> Tensor:
        exponentiate_(logits)
        return maximum.clone()

    def exponentiate_(logits: Tensor, *_: Tensor) -> None:
        if not spec.parallel.compile:
            rows = min(max(1, block // logits.shape[-1]), len(logits))
            torch.empty(rows, logits.shape[-1])  # in float32

    loss.compiled, loss.block = True, {"cpu": sys.maxsize}
    loss.sum_exponentials, loss.exponentiate_ = sum_exponentials, exponentiate_


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
        local = local_tensor(saved)
        allocate = partial(torch.empty_strided, local.shape, local.stride(), dtype=local.dtype)
        # `self` keeps the results alive as long as the graph.
        return self, allocate, (saved._spec if isinstance(saved, DTensor) else None)


def _storages(tree: Any) -> set[int]:
    local = [local_tensor(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    waited = (t.elem if isinstance(t, AsyncCollectiveTensor) else t for t in local)
    return {t.untyped_storage()._cdata for t in waited}


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    _, allocate, spec = packed
    return allocate() if spec is None else DTensor(allocate(), spec, requires_grad=False)
