"""The replay of a pipeline rank's step.

Each kind of computation, such as the first backward of a part, is replayed once. The step is the
sequence of `parallel.pipeline_schedule.operations`: a computation adds its peak to what is alive
when it starts, and leaves its change.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parallel.pipeline_schedule import Action, max_in_flight, operations
from planning.activations import INT64
from planning.allocations import Group
from planning.phases import Heap, Held, Peaks
from planning.sharded_step import DistributedStep
from planning.step_spec import StepSpec


class Computation(NamedTuple):
    """What the memory of a computation depends on.

    Attributes:
        part: Index of the part of this rank; equal ones have that of the first.
        starts: Whether it is the first forward, or the first backward, of its part.
        ends: Whether it is the last backward of its part.
        starts_rank, ends_rank: Whether it is the first or the last computation of the rank.
        others_reduce: Whether blocks of other parts reduce gradients in this backward: they have
            none, but free the input of the reduction before them (`FSDPParamGroup.post_backward`).
    """

    forward: bool
    part: int
    starts: bool
    ends: bool
    starts_rank: bool
    ends_rank: bool
    others_reduce: bool


class Replay(NamedTuple):
    """Bytes relative to the start of a computation: at the peak of each phase, and at its end.

    Attributes:
        reducing: Input of its last reduction, in bytes, which lives until the next one.
    """

    peaks: Peaks
    change: Held
    reducing: float


def replayed_micro_batches(spec: StepSpec) -> int:
    """Return the number of micro-batches after which a pipeline rank's memory repeats.

    As many as are in flight, and two more through each part: one leaves the first gradients, the
    other adds to them.
    """
    ranks, parts = spec.mesh.pp, spec.parallel.pp_parts
    in_flight = max_in_flight(spec.stage, ranks, parts, spec.micro_batches)
    if parts == 1:
        return min(spec.micro_batches, in_flight + 2)
    return min(spec.micro_batches, (-(-in_flight // (parts * ranks)) + 2) * ranks)


class PipelineStep(DistributedStep):
    """The step of one pipeline rank under FSDP2."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__(spec)
        # By computation and the input of the reduction before it.
        self.replays: dict[tuple[Computation, float], Replay] = {}
        # Of the computation that is replayed.
        self.starts_rank = self.ends_rank = self.others_reduce = False
        self.shares_gradient = False  # whether the gradient of the output is the received tensor

    def run(self) -> None:
        """Replay the step, with at most `replayed_micro_batches`."""
        heap, spec = self.heap, self.spec
        self.allocate_state()
        micro_batches = replayed_micro_batches(spec)
        order = [*operations(spec.stage, spec.mesh.pp, spec.parallel.pp_parts, micro_batches)]
        computations = self._computations([each.action for each in order if each.action])
        self._gather_kept_weights()
        transferred = {True: "activations", False: "temporary"}  # by direction
        sent = set()
        for kind, transfer, _ in order:
            if transfer is None:
                self._add(next(computations))
            elif kind == "receive":
                heap.add(transferred[transfer.forward], self.s)
            elif kind == "send":  # it frees the values of the previous one
                heap.free(transferred[transfer.forward], self.s * (transfer.forward in sent))
                sent.add(transfer.forward)
        for forward in sent:
            heap.free(transferred[forward], self.s)
        self.update()
        heap.phase("")

    def _gather_kept_weights(self) -> None:
        """Replay the all-gathers that start before the first computation."""
        self.heap.phase("forward")
        blocks = self.layers if self.first_kept == 0 else 0
        for group in [self.root] * bool(self.root.sizes) + [self.block] * blocks:
            self.unshard(group)
        self.heap.phase("")

    def _computations(self, actions: Sequence[Action]) -> Iterator[Computation]:
        shapes = [(len(p.layers), p.has_embedding, p.has_head) for p in self.spec.parts]
        last_backward = {action.part: index for index, action in enumerate(actions)}
        started: set[tuple[bool, int]] = set()
        with_blocks = {index for index, part in enumerate(self.spec.parts) if len(part.layers)}
        for index, (forward, part, _) in enumerate(actions):
            others = with_blocks - {part}
            if not self.reduces_each:
                others = {each for each in others if last_backward[each] < index}
            yield Computation(
                forward,
                shapes.index(shapes[part]),
                starts=(forward, part) not in started,
                ends=index == last_backward[part],
                starts_rank=index == 0,
                ends_rank=index == len(actions) - 1,
                others_reduce=not forward and bool(others),
            )
            started.add((forward, part))

    def _add(self, computation: Computation) -> None:
        """Add the peaks and the change of a computation to the heap."""
        heap = self.heap
        key = computation, self.reducing
        if key not in self.replays:
            self.replays[key] = self._replay(computation)
        peaks, change, self.reducing = self.replays[key]
        for phase, relative in peaks.items():
            highest = sum(heap.peaks.get(phase, {}).values())
            if heap.total + sum(relative.values()) > highest:
                heap.peaks[phase] = {part: heap.held[part] + relative[part] for part in relative}
        for part, size in change.items():
            heap.add(part, size)

    def _replay(self, computation: Computation) -> Replay:
        heap, self.heap = self.heap, Heap()
        self.part = self.spec.parts[computation.part]
        self.depth = len(self.part.layers)
        self.starts_rank, self.ends_rank = computation.starts_rank, computation.ends_rank
        self.others_reduce = computation.others_reduce
        self.continues, self.holds = not computation.starts, not computation.ends
        if computation.forward:
            self._forward_part()
        else:
            self._backward_part()
        self.heap.phase("")
        replay = Replay(self.heap.peaks, self.heap.held, self.reducing)
        self.heap = heap
        return replay

    def _forward_part(self) -> None:
        """Replay a forward, whose output is sent or whose loss is kept."""
        self.keeps_input = not self.depth  # otherwise that of the first block
        self.forward(self.part)
        self.heap.free("gathered", self.last_gather)
        self.last_gather = 0
        self.heap.free("activations", self.integers - self._saved_tokens())

    def _backward_part(self) -> None:
        """Replay a backward. The runtime holds what it received until the end."""
        heap, part, received = self.heap, self.part, self.s
        self.shares_gradient = not part.has_head
        self.backward(part)
        heap.free("activations", self._saved_tokens() if part.has_embedding else received)
        heap.free("temporary", 0 if part.has_head else received)

    def _saved_tokens(self) -> float:
        """Return the size of the tokens that the embedding saves, and of which are a tp rank's."""
        element = INT64 + (self.spec.mesh.tp > 1)
        return self.spec.local_tokens * element if self.part.has_embedding else 0

    def add_residual(self) -> None:
        if self.shares_gradient:  # not in place
            self.heap.add("temporary", self.s)
        self.shares_gradient = False
        super().add_residual()

    # ------------------------------------------------------------ weights and gradients

    def enter_root(self) -> None:
        if self.starts_rank and self.root.sizes:
            self.copy_out(self.root, forward=False)

    def enter_forward(self, index: int) -> None:
        self.keeps_input = index == 0 and not self.part.has_embedding
        if index < self.first_kept:
            super().enter_forward(index)
        elif not self.continues:
            self.copy_out(self.block, forward=False)

    def leave_forward(self, index: int) -> None:
        self.keeps_input = False
        super().leave_forward(index)

    def leave_backward(self, index: int) -> None:
        # The replay of a block has freed its input, unless its forward would have.
        freed = self.mode != "none" or not self.input_is_widened(self.norm_kind())
        if index == 0 and not self.part.has_embedding and freed:
            self.heap.add("activations", self.s)
        self._add_small_gradients(self.block, norms=2)
        super().leave_backward(index)

    def leave_root(self) -> None:
        if not self.depth and not self.input_is_widened(self.norm_kind(last=True)):
            self.heap.add("activations", self.s)
        part = self.part
        # The head's gradients are reduced over the replicas by the last backward that adds to them.
        ends_head = self.reduces_each and part.has_head and not self.holds
        self.holds = not (self.ends_rank or ends_head)
        adds = part.has_embedding or part.has_head
        if adds:
            self._add_small_gradients(self.root, norms=part.has_head)
        if adds and self.sums and self.holds:
            self.finish_backward(self.root, kept=True)
        elif adds or (self.sums and self.ends_rank and self.root.sizes):
            self.reduce(self.root, kept=not self.ends_rank, adds=adds)
        elif self.ends_rank:
            self.heap.free("gathered", self.root.gathered)
        if self.ends_rank:
            self.finish_reductions(self.layers, root=bool(self.root.sizes))
        elif self.others_reduce:
            self.heap.free("gathered", self.reducing)
            self.reducing = 0.0

    def _add_small_gradients(self, group: Group, norms: int) -> None:
        """Add what sums of gradients contain besides those of matrices: of norms, and padding."""
        if not self.sums or (self.same_dtype and self.continues):
            return
        element = self.spec.param_bytes
        self.heap.add("gathered", norms * self.spec.model.dim * element)
        if self.same_dtype:
            self.heap.add("gathered", group.to_reduce - group.exact * element)
        elif not self.continues:  # converted one by one
            converted = group.to_reduce - group.exact * element
            self.heap.use(converted + group.largest * element, "gathered")
