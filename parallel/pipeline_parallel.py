"""Pipeline parallelism: consecutive layers on each rank; micro-batches pass from rank to rank.

`apply_pipeline_parallel` removes the layers of other stages from the model; what stays keeps its
global names. `Pipeline` runs the operations of `parallel.pipeline_schedule`. Every stage reads its
own tokens, positions and labels; hidden states travel as they are between two blocks, local to cp
and tp. PyTorch's own runtime (torch.distributed.pipelining) keeps two receive buffers per
micro-batch and the output of every stage, and reduces gradients only after the last backward.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from model.llama import Llama
from parallel.config import ParallelConfig
from parallel.data_parallel import gather_kept_weights, hold_gradients
from parallel.pipeline_links import Links, Wait
from parallel.pipeline_schedule import Action, Transfer, operations, parts_of_rank
from parallel.timestamps import seconds_between, timestamp


def apply_pipeline_parallel(model: Llama, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Remove the other stages from `model` on the meta device, in place.

    With tied embeddings the last stage keeps the weight as `tok_embeddings`, its only name. `mesh`
    is the `pp` axis.
    """
    model.parts = parts_of_rank(model.config, parallel, mesh.size(), mesh.get_local_rank())
    here = {layer for part in model.parts for layer in part.layers}
    for layer in set(range(model.config.n_layers)) - here:
        delattr(model.layers, str(layer))  # the others keep their numbers
    has_head = model.parts[-1].has_head
    if not has_head:
        del model.norm, model.output
    if not (model.parts[0].has_embedding or (has_head and model.config.tie_embeddings)):
        del model.tok_embeddings


class Pipeline:
    """Passes micro-batches through the stages of this rank.

    Args:
        model: This rank's parts, parallelized.
        mesh: All axes.
        dtype: Of hidden states.
    """

    def __init__(
        self, model: Llama, mesh: DeviceMesh, parallel: ParallelConfig, dtype: torch.dtype
    ) -> None:
        self.model, self.dtype, self.device = model, dtype, torch.device(mesh.device_type)
        # Ranks that shard a sequence between two blocks.
        self.tp = mesh["tp"].size() if parallel.sequence_parallel else 1
        self.cp = mesh["cp"].size()
        self.replicas_only = parallel.reduce_gradients == "micro_batch"
        self.group = mesh["pp"].get_group()
        self.ranks, self.rank = mesh["pp"].size(), mesh["pp"].get_local_rank()
        self.links = Links(mesh["pp"], len(model.parts), dtype)
        self._measured: tuple[Any, Any, list[Wait]]  # start, end and waits of the last step
        self._tied_group = _tied_group(mesh["pp"]) if model.config.tie_embeddings else None
        model.forward = partial(self._all_stages, model.forward)  # type: ignore[method-assign]

    # ------------------------------------------------------------ training

    def accumulate(
        self,
        module: Any,
        micro_batches: Sequence[tuple[Any, int]],
        to_device: Callable[[Any], Any],
        n_targets: Tensor,
    ) -> Tensor:
        """Run forward and backward of all micro-batches of a step, as `MeshStrategy.accumulate`."""
        order = list(operations(self.rank, self.ranks, len(self.model.parts), len(micro_batches)))
        actions = [each.action for each in order if each.action is not None]
        shapes = [self._hidden_shape(batch[0], self.cp * self.tp) for batch, _ in micro_batches]
        started, self.links.waits = timestamp(self.device.type), []
        # What a backward needs of its forward: the input, and the edge of the output's graph.
        saved: dict[tuple[int, int], tuple[Tensor | None, Tensor | GradientEdge]] = {}
        values: Tensor | None = None  # received, or to be sent
        losses = [] if self.model.parts[-1].has_head else [torch.zeros((), device=self.device)]
        hold_gradients(self.model, True, self.replicas_only)
        gather_kept_weights(self.model)  # while hidden states are on their way
        for kind, transfer, action in order:
            if action is None:
                assert transfer is not None
                if kind == "receive":
                    self.links.receive(transfer, shapes[transfer.micro_batch])
                elif kind == "wait":
                    values = self.links.received(transfer)
                elif values is not None and transfer.forward:  # a hook sends gradients
                    self.links.send(transfer, values)
                    values = None
                continue
            part, index = self.model.parts[action.part], action.micro_batch
            if action.forward:
                batch, n_documents = micro_batches[index]
                hidden = None if values is None else values.requires_grad_()
                out = module(*to_device(batch), n_documents=n_documents, hidden=hidden, part=part)
                if part.has_head:
                    output, values = out / n_targets, None
                    losses.append(output.detach())
                else:  # the graph without the values, which are freed once sent
                    output, values = get_gradient_edge(out), out.detach()
                saved[action.part, index] = hidden, output
            else:
                hidden, output = saved.pop((action.part, index))
                self._prepare_backward(actions)
                if hidden is not None:  # sent before FSDP2 waits for its reductions
                    hidden.register_post_accumulate_grad_hook(self._send_gradient(action))
                torch.autograd.backward(output, values)
                values = None
            actions.pop(0)
            out = output = hidden = None
        self.links.finish_sends()
        self._sum_tied_gradients()
        self._measured = started, timestamp(self.device.type), self.links.waits
        return torch.stack(losses)

    def step_seconds(self) -> tuple[float, float]:
        """Return how long this rank computed in the last step, and how long it was in the pipeline.

        The difference is the time in which it waited for other stages. The collectives of a stage
        count as computation. The device must have completed the step.
        """
        start, end, waits = self._measured
        seconds = seconds_between(start, end)
        return seconds - sum(seconds_between(wait.start, wait.end) for wait in waits), seconds

    def _send_gradient(self, action: Action) -> Callable[[Tensor], None]:
        """Return a hook that sends the gradient of a received tensor to its source."""
        stage = action.part * self.ranks + self.rank
        transfer = Transfer(stage, stage - 1, action.micro_batch)

        def send(hidden: Tensor) -> None:
            gradient, hidden.grad = hidden.grad, None
            assert gradient is not None
            self.links.send(transfer, gradient)

        return send

    def _prepare_backward(self, actions: Sequence[Action]) -> None:
        """Let the backward that is first in `actions` reduce what no later one adds to.

        The root's gradients wait for the last backward: another forward would gather its weights
        again. FSDP2 itself would gather the block that ran last, which may be of another part.
        """
        own = self.model.parts[actions[0].part]
        blocks = [self.model.layers.get_submodule(str(layer)) for layer in own.layers]
        root: Any = self.model
        root.set_modules_to_backward_prefetch(blocks[-1:] or [root])
        root.set_is_last_backward(len(actions) == 1)  # FSDP2 waits for all reductions in it
        if len(actions) == 1:
            hold_gradients(self.model, False, self.replicas_only)
        elif all(later.part != actions[0].part for later in actions[1:]):
            for block in blocks:
                hold_gradients(block, False, self.replicas_only)
            if own.has_head and self.replicas_only:
                # FSDP2 all-reduces only in a backward that adds to these gradients.
                root.set_requires_all_reduce(True, recurse=False)

    @property
    def tied_weight(self) -> Tensor | None:
        """The weight that is the embedding of the first stage and the head of the last one."""
        has_copy = self._tied_group is not None and self.rank in (0, self.ranks - 1)
        return self.model.tok_embeddings.weight if has_copy else None

    def _sum_tied_gradients(self) -> None:
        """Sum the gradients of the tied weight over the two stages that have it."""
        if (weight := self.tied_weight) is not None:
            gradient: Any = weight.grad
            dist.all_reduce(gradient.to_local(), group=self._tied_group)

    # ------------------------------------------------------------ without gradients

    def _all_stages(self, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run `Llama.forward` of a part; without one, of all stages.

        All stages return the logits. The loss is returned by the last stage, and 0 by the others,
        which do not wait: `MeshStrategy.sum_losses` sends it to all.
        """
        if kwargs.get("part") is not None:
            return forward(*args, **kwargs)
        if torch.is_grad_enabled():
            raise ValueError("gradients need `Pipeline.accumulate`")
        inputs = dict(zip(("tokens", "positions", "labels"), args, strict=False)) | kwargs
        self.links.waits = []
        # Inside of the hooks of context parallelism, tokens are local to cp.
        shape = self._hidden_shape(inputs["tokens"], self.tp)
        out = None
        for index, part in enumerate(self.model.parts):
            stage = index * self.ranks + self.rank
            hidden, transfer = None, Transfer(stage - 1, stage, 0)
            if not part.has_embedding:
                self.links.receive(transfer, shape)
                hidden = self.links.received(transfer)
            out = forward(**inputs, hidden=hidden, part=part)
            if not part.has_head:
                self.links.send(Transfer(stage, stage + 1, 0), out)
        self.links.finish_sends()
        assert out is not None
        has_head = self.model.parts[-1].has_head
        if inputs.get("labels") is not None:
            return out if has_head else torch.zeros((), device=self.device)
        logits = out.full_tensor() if isinstance(out, DTensor) else out
        return self._broadcast_logits(logits if has_head else None)

    def broadcast_from_last(self, values: Tensor) -> None:
        """Replace a tensor on all stages by that of the last stage."""
        dist.broadcast(values, group=self.group, group_src=self.ranks - 1)

    def _broadcast_logits(self, logits: Tensor | None) -> Tensor:
        """Send the logits (batch, seq, vocab) of the last stage to all; a cache may cut `seq`."""
        shape = torch.tensor([0] * 3 if logits is None else logits.shape, device=self.device)
        self.broadcast_from_last(shape)
        if logits is None:
            logits = torch.empty(shape.tolist(), dtype=self.dtype, device=self.device)
        logits = logits.contiguous()
        self.broadcast_from_last(logits)
        return logits

    def _hidden_shape(self, tokens: Tensor, seq_ranks: int) -> tuple[int, int, int]:
        return tokens.shape[0], tokens.shape[1] // seq_ranks, self.model.config.dim


def _tied_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the group of the first and the last rank; in other ranks their own."""
    global_ranks = dist.get_process_group_ranks(mesh.get_group())
    ends = [global_ranks[0], global_ranks[-1]]
    members = ends if dist.get_rank() in ends else [dist.get_rank()]
    return dist.new_group(members, use_local_synchronization=True)
