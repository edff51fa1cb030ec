"""What a rank holds at the fullest moment of a step, followed tensor by tensor on fake tensors.

The real `parallelize`, FSDP2 and autograd run for rank 0 in a process group that is not there, two
steps, of which the second counts. Nothing is compiled: where the job is, or where the device has a
fused kernel that CPUs lack, an operation that keeps what that one keeps stands in its place. Deep
models are traced at two depths; each moment of a step lies on a straight line through the two.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention import AttentionKernel, Mask
from model.llama import FeedForward, Llama
from model.loss import BLOCK
from model.norm import RMSNorm
from parallel.activation_checkpoint import keeps
from parallel.gradients import clip_grad_norm
from parallel.step_scalars import N_EXTRA_SCALARS
from parallel.trace import materialise, traced_model
from planning.activations import HALF, cuts_tokens, kept_by_block, whole_hidden
from planning.job import Job
from planning.memory import Memory
from planning.memory_tracker import MemoryTracker
from planning.moments import FakeAdamW

DEPTHS = (4, 6)  # first, second, last but one and last block differ from those between them

# Category of the tracker: field of `Memory`. Others are temporary.
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


def traced_memory(job: Job) -> Memory:
    """The fullest moment of a step of the job on rank 0; takes seconds."""
    budget = job.parallel.activation_checkpoint
    if not isinstance(budget, float):
        return _fullest(job, _deep_peaks(job))
    if budget >= HALF:  # what is recomputed comes back as where all products are kept
        more = _recomputing(job, "none" if budget == 1 else "selective")
        peaks = _deep_peaks(more)
        change = job.model.n_layers * (kept_by_block(job) - kept_by_block(more))
        all_kept = peaks["head"]["forward"]
        for held in peaks.values():
            alive = held.get("forward", 0)
            held["forward"] = alive + change * min(alive / all_kept, 1)
        return _fullest(job, peaks)
    full, none = _recomputing(job, "full"), _recomputing(job, "none")
    least, kept, most = (kept_by_block(each) for each in (full, job, none))
    share = (kept - least) / (most - least)
    return _fullest(job, _on_line(_deep_peaks(full), _deep_peaks(none), share))


def _recomputing(job: Job, mode: Literal["full", "selective", "none"]) -> Job:
    parallel = dataclasses.replace(job.parallel, activation_checkpoint=mode)
    return dataclasses.replace(job, parallel=parallel)


def _deep_peaks(job: Job) -> Peaks:
    """As `_peaks`; more layers than have to be traced follow from two depths."""
    layers = job.model.n_layers
    if layers <= DEPTHS[-1]:
        return _peaks(job)
    shallow, deep = (
        _peaks(dataclasses.replace(job, model=dataclasses.replace(job.model, n_layers=depth)))
        for depth in DEPTHS
    )
    return _on_line(shallow, deep, (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def _on_line(first: Peaks, second: Peaks, share: float) -> Peaks:
    """Each moment's bytes on the line through both: at the first for a share of 0."""
    peaks = {}
    for moment, before in first.items():
        held = second[moment]
        names = held.keys() | before.keys()
        line = {name: (before.get(name, 0), held.get(name, 0)) for name in names}
        peaks[moment] = {name: a + share * (b - a) for name, (a, b) in line.items()}
    return peaks


def _fullest(job: Job, peaks: Peaks) -> Memory:
    """The moment at which most is held."""
    rows = min(job.step.head_chunk, job.local_tokens)
    vocab = job.model.vocab_size // (job.mesh.tp if job.parallel.loss_parallel else 1)
    logits = rows * vocab * job.param_bytes
    moment, held = max(peaks.items(), key=lambda item: sum(item[1].values()))
    parts = {field.name: 0 for field in dataclasses.fields(Memory) if field.name != "moment"}
    held = dict(held)
    held["logits"] = min(logits, held.get("head", 0))
    held["head"] = held.get("head", 0) - held["logits"]
    for category, size in held.items():
        parts[_FIELDS.get(category, "temporary")] += round(size)
    return Memory(**parts, moment=moment)


def _peaks(job: Job) -> Peaks:
    """Bytes by category at the fullest instant of each moment of the second step."""
    # What tensor and context parallelism receive are activations; FSDP2 has the other library.
    tracker = MemoryTracker({}, fake=True, collectives=("c10d",))
    precision = dataclasses.replace(job.precision, fp8=None)
    parallel, lazily = job.parallel, _recomputes_lazily(job)
    if lazily:
        parallel = dataclasses.replace(parallel, activation_checkpoint="none")
    prepare = partial(_prepare, job)
    with (
        traced_model(job.model, job.mesh, parallel, precision, prepare) as (llama, strategy),
        tracker,
    ):
        materialise(llama)
        if job.accelerator == "cuda" or job.parallel.compile:
            _as_fused(llama, job)
        if lazily:
            for block in llama.layers:
                setattr(block, "forward", partial(_forward_lazily, block.forward))  # noqa: B010
        _name_moments(llama, tracker)
        optimizer = FakeAdamW(llama, job.precision.optimizer_state, job.accelerator)
        tracker.model, tracker.optimizer = llama, cast(Any, optimizer)
        for _ in range(2):
            tracker.peaks.clear()
            _step(llama, strategy, optimizer, tracker, job)
    return cast(Peaks, dict(tracker.peaks))


def _step(
    llama: Any, strategy: Any, optimizer: FakeAdamW, tracker: MemoryTracker, job: Job
) -> None:
    """As `train_step` does, on unknown tokens; of many micro-batches two are enough."""
    micro_batches = min(job.micro_batches, 2)
    for place in range(1, micro_batches + 1):
        tracker.phase = "inputs"
        tokens = torch.empty(job.micro_batch_size, job.seq_len, dtype=torch.int64)  # (batch, seq)
        positions = torch.empty_like(tokens) if job.document_mask else None
        labels = torch.empty_like(tokens)
        tracker.phase = "forward"
        with strategy.micro_batch_sync.no_backward_sync(llama, place < micro_batches):
            loss = llama(tokens, positions, labels)  # the hooks name what follows
            loss.backward()
        del loss
        if place < micro_batches:
            # What is left of it are its gradients, whole until the last one's are reduced.
            tracker.rename("unreduced")
    tracker.phase = "update"
    clip_grad_norm(llama, max_norm=1.0, extra_scalars=torch.empty(N_EXTRA_SCALARS))
    optimizer.step()
    for parameter in llama.parameters():
        parameter.grad = None


def _name_moments(llama: Llama, tracker: MemoryTracker) -> None:
    """Tells the tracker when the head begins, and when the backward comes to another block."""
    last = len(llama.layers) - 1
    names = {-1: "embedding", 0: "first block", 1: "second block"}
    names |= {last: "last block", last - 1: "last block but one"}

    def begin(moment: str) -> None:
        tracker.phase = moment

    llama.loss.register_forward_pre_hook(lambda *_: begin("head"))
    llama.loss.register_forward_hook(lambda *_: begin(names[last]))
    for place, block in enumerate(llama.layers):
        before = names.get(place - 1, "a block")

        def hook(_: Any, arguments: tuple[Tensor, ...], before: str = before) -> None:
            if arguments[0].requires_grad:  # its gradient is the last of this block's backward
                arguments[0].register_hook(lambda _: begin(before))

        block.register_forward_pre_hook(hook)


# ---------------------------------------------------------------- in the place of what is fused


def _prepare(job: Job, llama: Llama) -> None:
    """The attention of a GPU, of which every kernel keeps the same and none a mask."""
    if job.accelerator == "cuda":
        llama.kernel = _MasklessKernel("sdpa")
        for block in llama.layers:
            cast(Any, block).attention.kernel = llama.kernel


class _MasklessKernel(AttentionKernel):
    """Plain causal attention, which keeps queries, keys, values, result and sums."""

    def mask(self, *_: Any, **__: Any) -> Mask:
        return None


def _as_fused(llama: Any, job: Job) -> None:
    """One operation each for what is one kernel on a GPU, or where it is compiled."""
    llama.loss.block = {"cpu": BLOCK[job.accelerator]}
    for module in llama.modules():
        if isinstance(module, RMSNorm):
            if job.accelerator == "cuda" or module is not llama.norm:  # which is not compiled
                setattr(module, "forward", partial(_norm, module))  # noqa: B010
        elif job.parallel.compile and isinstance(module, FeedForward):
            again = job.parallel.activation_checkpoint != "none"
            waiting = whole_hidden(job) if again and cuts_tokens(job) else 0
            setattr(module, "forward", partial(_feed_forward, module, again, waiting))  # noqa: B010
    if job.parallel.compile:
        llama.loss.compiled = True
        llama.loss.sum_exponentials = lambda logits, maximum: maximum.clone()
        llama.loss.exponentiate_ = lambda logits, maximum, factor: None


def _norm(module: Any, x: Tensor) -> Tensor:
    return cast(Tensor, _FusedNorm.apply(x, module.weight))


def _feed_forward(module: Any, again: bool, waiting: int, x: Tensor) -> Tensor:
    return module.w2(_FusedSwiGLU.apply(module.w1(x), module.w3(x), again, waiting))


class _FusedNorm(torch.autograd.Function):
    """Keeps its input, the weight, and a root for each token; what it computes is meaningless."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x[..., :1].float())
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        _, weight, _ = ctx.saved_tensors
        return grad * weight, torch.empty_like(weight)


class _FusedSwiGLU(torch.autograd.Function):
    """Keeps its two inputs: silu is computed again.

    Where it is not kept, the compiler makes the result anew in the kernel of the gradients. Until
    then `waiting` bytes more are held: the gradient that it is multiplied with for the weight's.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, again: bool, waiting: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.again, ctx.waiting = again, waiting
        return gate * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        waiting = torch.empty(ctx.waiting, dtype=torch.uint8)
        product = gate * up if ctx.again else None
        gradients = grad * up, grad * gate
        del product, waiting  # only now
        return *gradients, None, None


# ---------------------------------------------------------------- what a compiler recomputes


def _recomputes_lazily(job: Job) -> bool:
    """Whether a compiler recomputes what is no product's result, each tensor when it is needed."""
    return job.parallel.compile and job.parallel.activation_checkpoint == "selective"


def _forward_lazily(forward: Any, *arguments: Any) -> Tensor:
    """Of a block whose backward makes anew what `_Kept` has not kept."""
    kept = _Kept()
    with kept, saved_tensors_hooks(kept.pack, _unpacked):
        out = forward(*arguments)
    kept.results.pop()  # the last product's, which nothing is made from
    return cast(Tensor, out)


class _Kept(TorchDispatchMode):
    """Holds the results of products and of attention until the block's backward has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []
        self.others: set[int] = set()  # storages of what else was made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # they turn it into local operations, which come here
        out = func(*args, **(kwargs or {}))
        if keeps(func):
            if func.namespace == "_c10d_functional":
                self.results.pop()  # tensor parallelism's sum is in the place of the rank's part
            self.results.append(out)
            self.others -= _storages(out)  # one that is gone may have had the same address
        else:
            self.others |= _storages(out) - _storages((args, kwargs))  # of views nothing
        return out

    def pack(self, saved: Tensor) -> Any:
        """What is saved for the backward, or how to make something of its size."""
        if not _storages(saved) & self.others:
            return saved
        local = saved.to_local() if isinstance(saved, DTensor) else saved
        made = partial(torch.empty_strided, local.shape, local.stride(), dtype=local.dtype)
        return self, made, (saved._spec if isinstance(saved, DTensor) else None)


def _storages(tree: Any) -> set[int]:
    tensors = [each for each in tree_leaves(tree) if isinstance(each, Tensor)]
    local = [each._local_tensor if isinstance(each, DTensor) else each for each in tensors]
    local = [each.elem if isinstance(each, AsyncCollectiveTensor) else each for each in local]
    return {each.untyped_storage()._cdata for each in local}


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    _, made, spec = packed
    return made() if spec is None else DTensor(made(), spec, requires_grad=False)
