"""Weights and gradients in the replay of a step: under FSDP2, and in one process."""

from planning.allocations import FLOAT32, Group, Step
from planning.step_spec import StepSpec


def first_kept_block(spec: StepSpec) -> int:
    """Return the first block whose weights stay gathered from its forward to its backward.

    In a pipeline it is the first of the rank or, if there is none, its number of layers.
    """
    layers, reshard = spec.n_layers, spec.parallel.reshard_after_forward
    if reshard is None:
        return layers - 1 if spec.mesh.dp_shard * spec.mesh.cp > 1 and spec.mesh.pp == 1 else 0
    return layers if reshard else 0


class DistributedStep(Step):
    """A step under FSDP2."""

    def __init__(self, spec: StepSpec) -> None:
        super().__init__(spec)
        self.first_kept = first_kept_block(spec)
        # The input of a reduction lives until the next one.
        self.reducing = 0.0
        self.gathering: dict[int, float] = {}  # results of all-gathers by block
        self.last_gather = 0.0
        self.same_dtype = spec.param_bytes == spec.reduce_bytes
        self.sums = self.accumulates and not self.reduces_each  # before the reduction
        self.replays_earlier = self.accumulates

    def start(self) -> None:
        heap, layers = self.heap, self.layers
        if not self.continues:
            return
        both = [(self.block, layers), (self.root, 1)]
        if not self.reduces_each:
            heap.add("gathered", sum(n * group.to_reduce for group, n in both))
        elif self.spec.mesh.dp_replicate > 1:
            # FSDP2's partial reductions, without those over the replicas.
            heap.add("gathered", sum(n * group.to_reduce / self.shards for group, n in both))
        else:
            heap.add("gradients", sum(n * group.shard_elements for group, n in both) * FLOAT32)
        # They stay gathered between micro-batches.
        heap.add("gathered", self.root.gathered)
        heap.add("gathered", self.block.gathered * (layers - self.first_kept))

    def add_to_sums(self, group: Group) -> None:
        """Add gradients to sums in another data type, which CPUs do in float32."""
        for size in group.sizes:
            if self.on_cpu:
                self.heap.use((1 if self.wide else 2) * size * FLOAT32)
            self.heap.free("gathered", size * self.spec.param_bytes)

    def enter_root(self) -> None:
        if not self.continues:
            self.unshard(self.root)
            self.copy_out(self.root, forward=True)

    def unshard(self, group: Group) -> None:
        """Start an all-gather."""
        heap = self.heap
        if self.shards > 1:
            shard = group.gathered / self.shards if self.wide else 0  # in the compute dtype
            heap.add("gathered", shard + group.gathered)
            self.communicate("all_gather", group.gathered)
            heap.free("gathered", shard)

    def copy_out(self, group: Group, forward: bool) -> None:
        """Copy the result of an all-gather to the weights."""
        heap = self.heap
        heap.add("gathered", group.gathered)
        if self.shards == 1:
            if self.wide:
                heap.use(group.largest * self.spec.param_bytes, "gathered")
        elif forward:  # the previous result lives until here
            heap.free("gathered", self.last_gather)
            self.last_gather = group.gathered
        else:
            heap.free("gathered", group.gathered)

    def kept_before(self, index: int) -> bool:
        """Return whether a block's weights are still there from the previous micro-batch."""
        return self.continues and index >= self.first_kept

    def enter_forward(self, index: int) -> None:
        following = index + 1
        if not self.kept_before(index):
            if index == 0:
                self.unshard(self.block)
            self.copy_out(self.block, forward=True)
        if self.shards > 1 and following < self.depth and not self.kept_before(following):
            self.unshard(self.block)

    def leave_forward(self, index: int) -> None:
        if index < self.first_kept:
            self.heap.free("gathered", self.block.gathered)

    def root_backward(self) -> None:
        self.heap.free("gathered", self.last_gather)
        self.last_gather = 0
        if self.depth and self.first_kept >= self.depth:  # FSDP2 prefetches what ran last
            self.unshard(self.block)

    def enter_backward(self, index: int) -> None:
        if index < self.first_kept:
            self.copy_out(self.block, forward=False)
        if 0 < index <= self.first_kept and self.shards > 1:
            self.unshard(self.block)

    def leave_backward(self, index: int) -> None:
        self.finish_backward(self.block, kept=index >= self.first_kept)

    def accumulate(self, elements: int) -> None:
        if self.sums and self.same_dtype and self.continues:  # added to an existing gradient
            self.heap.free("gathered", elements * self.spec.param_bytes)

    def finish_backward(self, group: Group, kept: bool) -> None:
        """Replay what follows a group's backward: its gradients are summed or reduced.

        Args:
            kept: Whether the weights stay gathered if another micro-batch follows.
        """
        if not (self.sums and self.holds):
            self.reduce(group, kept and self.holds)
            return
        gradients = group.exact * self.spec.param_bytes
        if not self.same_dtype and self.continues:
            self.add_to_sums(group)
        elif not self.same_dtype:  # converted one by one
            self.heap.add("gathered", group.to_reduce - gradients)
        self.heap.free("gathered", 0 if kept else group.gathered)

    def reduce(self, group: Group, kept: bool, adds: bool = True) -> None:
        """Replay the reduction of a group's gradients.

        Args:
            kept: Whether the weights stay gathered.
            adds: Whether this backward has added gradients of its own.
        """
        heap, spec = self.heap, self.spec
        gradients = group.exact * spec.param_bytes
        if self.sums:
            if adds and not self.same_dtype:
                self.add_to_sums(group)
            gradients = group.to_reduce
        else:  # those of the norms
            norms = 2 if group is self.block else spec.has_head
            heap.add("gathered", norms * spec.model.dim * spec.param_bytes)
        heap.free("gathered", self.reducing + (0 if kept else group.gathered))
        self.reducing = 0.0
        # A loop variable of FSDP2's `foreach_reduce` holds the last gradient until it returns.
        last = 0.0
        norm_is_last = spec.model.tie_embeddings and spec.has_head
        if group is self.root and self.shards > 1 and not norm_is_last:
            last = gradients * self.head_elements / group.exact
        heap.add("gathered", group.to_reduce)
        if self.on_cpu and not self.same_dtype and not self.sums:
            heap.use(group.largest * spec.param_bytes)
        heap.free("gathered", gradients - last)
        output: float = group.to_reduce
        if self.shards > 1:
            output = group.to_reduce / self.shards
            heap.add("gathered", output)
            self.communicate("reduce_scatter", group.to_reduce)
            self.reducing = group.to_reduce
        elif spec.mesh.dp_replicate > 1:  # FSDP2 divides by 1, into a new tensor
            heap.use(group.to_reduce, "gathered")
        self._reduced(group, output)
        heap.free("gathered", last)

    def _reduced(self, group: Group, output: float) -> None:
        """Replay what follows the reduce-scatter, whose result is in `gathered`."""
        heap, spec = self.heap, self.spec
        shard = group.shard_elements * FLOAT32
        replicated = spec.mesh.dp_replicate > 1
        partial = 0.0  # sum of earlier micro-batches without the replicas' parts
        if self.reduces_each and replicated:
            if self.holds:
                if self.continues and self.shards == 1:
                    self.reducing = output  # also the input of the reduction
                elif self.continues:
                    heap.free("gathered", output)
                return
            partial = output
        adds = self.reduces_each and not replicated and self.continues
        if spec.reduce_bytes == FLOAT32 and adds and self.shards == 1:
            self.reducing = output  # the buffer is the new gradient
            return
        if spec.reduce_bytes == FLOAT32:
            heap.move("gathered", "gradients", shard)
        else:
            heap.add("gradients", shard)
            if replicated:  # the buffer lives until the end of the backward
                pass
            elif self.shards == 1:
                self.reducing = output
            else:
                heap.free("gathered", output)
        heap.free("gradients", shard if adds else 0)
        heap.free("gathered", partial)

    def leave_root(self) -> None:
        self.finish_backward(self.root, kept=True)
        self.finish_reductions(0 if self.holds else self.depth, not self.holds)

    def finish_reductions(self, blocks: int, root: bool) -> None:
        """Free the buffers of reductions over all data ranks that ended with a backward.

        Args:
            blocks: Number of blocks that were reduced.
            root: Whether the root was reduced.
        """
        self.heap.free("gathered", self.reducing)
        self.reducing = 0.0
        if self.spec.mesh.dp_replicate > 1 and self.spec.reduce_bytes < FLOAT32:
            elements = blocks * self.block.shard_elements + root * self.root.shard_elements
            self.heap.free("gathered", elements * self.spec.reduce_bytes)


class SingleProcessStep(Step):
    """A step in one process: no gathering, each gradient is accumulated directly.

    In mixed precision, low-precision copies of weights live until their gradients are computed.
    """

    def start(self) -> None:
        elements = self.block.elements * self.layers + self.root.elements
        if self.accumulates:
            self.heap.add("gradients", elements * FLOAT32)
        if self.wide:
            self.heap.add("gathered", elements * self.spec.param_bytes)

    def accumulate(self, elements: int) -> None:
        heap, size = self.heap, elements * self.spec.param_bytes
        if self.accumulates:
            if self.on_cpu and self.wide:  # converted for the sum
                heap.use(elements * FLOAT32)
            heap.free("gathered", size)
        elif self.wide:
            heap.add("gradients", elements * FLOAT32)
            heap.free("gathered", size)
        else:
            heap.move("gathered", "gradients", size)
        if self.wide:
            heap.free("gathered", size)  # the copy
