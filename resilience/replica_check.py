"""Silent data corruption: replicated state is compared by hash between the ranks that hold it.

Hardware can change a bit in memory or compute a wrong value without an error. Ranks that hold
copies of the same values notice it: weights, moments and reduced gradients of HSDP replicas and of
parameters that are replicated under tensor parallelism, the tied weight of the first and the last
pipeline stage, and the weights that each rank gathers under FSDP. `training.recovery` compares them
every `faults.replica_check_interval` steps and before each checkpoint, so a checkpoint never
contains a difference. Imported only with several processes.
"""

import socket
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from parallel.data_parallel import free_gathered_weights
from parallel.mesh import MeshShape

GATHERED = "gathered weights"
TIED = "tok_embeddings.weight"  # on the first and on the last pipeline stage
COLUMNS = 1024
MAX_NAMES = 3
_FIRST_MULTIPLIER = -7046029254386353131  # odd: 2 ** 64 / golden ratio, as a signed number


class Copy(NamedTuple):
    """The hash of one tensor that other ranks also hold.

    Attributes:
        kind: What it is, such as `weights`.
        name: Name of the parameter.
        layout: Mesh axes on which the tensor is sharded, as bits; equal on all ranks.
        shard: Index of this rank's shard on these axes; ranks with an equal one hold a copy.
        hash: Scalar int64 on the device.
    """

    kind: str
    name: str
    layout: int
    shard: int
    hash: Tensor


class Difference(NamedTuple):
    """Ranks whose copies differ; equal on all ranks.

    Attributes:
        ranks: Those that differ from the majority; all ranks with a copy if there is no majority.
        hosts: The host of each.
        has_majority: Whether the other ranks agree with each other.
        tensors: Which tensors differ.
    """

    ranks: list[int]
    hosts: list[str]
    has_majority: bool
    tensors: list[str]

    def __str__(self) -> str:
        pairs = zip(self.ranks, self.hosts, strict=True)
        named = [f"rank {rank} ({host})" for rank, host in pairs]
        more = len(self.tensors) - MAX_NAMES
        tensors = ", ".join(self.tensors[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
        which = (", " if self.has_majority else " or ").join(named)
        return f"Silent data corruption on {which}: the copies of {tensors} differ."

    def advice(self) -> str:
        """Return the reason for stopping the run, and a remedy."""
        hosts = ", ".join(dict.fromkeys(self.hosts))
        return (
            f"copies of replicated state differ on {hosts}; check its memory and GPUs, and resume "
            "without this host"
        )


class ReplicaCheck:
    """Comparison of the copies of a model and its optimizer between all ranks.

    Args:
        model: Parallelized model whose parameters are DTensors.
        optimizer: Its optimizer, whose state has tensors or objects with tensors as attributes.
        interval: Steps between comparisons.
        mesh: Ranks on different pipeline stages have no copies of each other's tensors, apart from
            the tied weight of the first and the last one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        interval: int,
        mesh: MeshShape,
    ) -> None:
        self.interval = interval
        self._stage = self._tied = None
        if mesh.pp > 1:
            config: Any = model.config
            own = mesh.ranks_of_stage(mesh.stage(dist.get_rank()))
            self._stage = dist.new_group(own, use_local_synchronization=True)
            if config.tie_embeddings:
                # All ranks create it, because names of groups depend on their number.
                ends = [*mesh.ranks_of_stage(0), *mesh.ranks_of_stage(mesh.pp - 1)]
                ranks = sorted(ends) if dist.get_rank() in ends else own
                self._tied = dist.new_group(ranks, use_local_synchronization=True)
        self.reported_hosts: set[str] = set()
        self._model, self._optimizer = model, optimizer
        self._gradients: list[Copy] | None = None
        optimizer.register_step_pre_hook(self._hash_gradients)

    def prepare(self, step: int) -> None:
        """Select whether to hash the gradients of the next step before they are applied."""
        self._gradients = [] if self.is_due(step) else None

    def is_due(self, step: int) -> bool:
        """Return whether copies are compared after a step."""
        return step % self.interval == 0

    def _hash_gradients(self, *_: Any) -> None:
        if self._gradients is not None:
            named = self._model.named_parameters()
            tensors = ((name, p, p.grad) for name, p in named if p.grad is not None)
            self._gradients = list(self._copies("gradients", tensors))

    @torch.no_grad()
    def compare(self) -> Difference | None:
        """Return the ranks whose copies differ, or None; a collective call between two steps."""
        free_gathered_weights(self._model)
        copies = [*(self._gradients or ()), *self._state(), *_gathered_weights(self._model)]
        self._gradients = None
        if self._stage is None:
            difference = find_difference(copies, None)
        else:
            tied = [each for each in copies if self._is_tied(each.name)]
            others = [each for each in copies if not self._is_tied(each.name)]
            found = find_difference(others, self._stage), find_difference(tied, self._tied)
            difference = _of_all_stages(found)
        if difference is not None:
            hosts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(hosts, socket.gethostname())
            difference = difference._replace(hosts=[hosts[rank] for rank in difference.ranks])
        return difference

    def _state(self) -> Iterator[Copy]:
        named = list(self._model.named_parameters())
        yield from self._copies("weights", ((name, weight, weight) for name, weight in named))
        for name, weight in named:
            for key, value in self._optimizer.state.get(weight, {}).items():
                tensors = [value] if isinstance(value, Tensor) else vars(value).values()
                held = ((name, weight, each) for each in tensors if isinstance(each, Tensor))
                yield from self._copies(key, held)

    def _copies(self, kind: str, tensors: Iterable[tuple[str, Tensor, Tensor]]) -> Iterator[Copy]:
        """Hash the tensors that other ranks also hold.

        Args:
            tensors: Name and parameter, and a tensor that is sharded like the parameter.
        """
        for name, parameter, tensor in tensors:
            layout, shard, n_copies = _layout(parameter)
            if n_copies > 1 or self._is_tied(name):
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                yield Copy(kind, name, layout, shard, hash_tensor(local))

    def _is_tied(self, name: str) -> bool:
        """Return whether another pipeline stage has a parameter too."""
        return self._tied is not None and name == TIED


def find_difference(copies: Sequence[Copy], among: dist.ProcessGroup | None) -> Difference | None:
    """Return the ranks whose copies differ, without their hosts; all ranks of `among` call it.

    Args:
        copies: Of this rank; on each rank as many, with equal kinds, names and layouts.
        among: The ranks that hold the copies. None: all.
    """
    groups: dict[tuple[str, int], list[Copy]] = defaultdict(list)
    for copy in copies:
        groups[copy.kind, copy.layout].append(copy)
    if not groups:
        return None
    digests = [_combine([copy.hash for copy in group]) for group in groups.values()]
    shards = [group[0].shard for group in groups.values()]
    by_group = zip(groups.values(), _all_gather(torch.stack(digests), shards, among), strict=True)
    differing = [copy for group, values in by_group if _deviating(values)[0] for copy in group]
    # A changed shard also changes what other ranks gather; then only the shard is reported.
    differing = [copy for copy in differing if copy.kind != GATHERED] or differing
    if not differing:
        return None
    hashes, shards = [copy.hash for copy in differing], [copy.shard for copy in differing]
    found = [_deviating(values) for values in _all_gather(torch.stack(hashes), shards, among)]
    global_ranks = dist.get_process_group_ranks(among)
    return Difference(
        ranks=sorted({global_ranks[rank] for ranks, _ in found for rank in ranks}),
        hosts=[],
        has_majority=all(has_majority for _, has_majority in found),
        tensors=[
            f"{copy.kind} of {copy.name}"
            for copy, (ranks, _) in zip(differing, found, strict=True)
            if ranks
        ],
    )


def _of_all_stages(own: Sequence[Difference | None]) -> Difference | None:
    """Return the differences of all pipeline stages as one; all ranks call it."""
    gathered: list[Sequence[Difference | None]] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    found = [each for differences in gathered for each in differences if each is not None]
    if not found:
        return None
    return Difference(
        ranks=sorted({rank for each in found for rank in each.ranks}),
        hosts=[],
        has_majority=all(each.has_majority for each in found),
        tensors=list(dict.fromkeys(name for each in found for name in each.tensors)),
    )


def hash_tensor(tensor: Tensor) -> Tensor:
    """Return an int64 hash of the bits of a tensor, as a scalar on its device.

    A sum modulo 2 ** 64 of the tensor's 8-byte words, each times an odd number: changing one bit
    changes the sum by 2 ** k times an odd number, so it always changes the hash.
    """
    n_bytes = tensor.numel() * tensor.itemsize
    content = tensor.detach().reshape(-1).view(torch.int8)  # (bytes)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = n_bytes // 8 * 8
    words = content[:whole].view(torch.int64)  # (words)
    multipliers = _multipliers(COLUMNS, tensor.device)
    n_rows = len(words) // COLUMNS
    columns = words[: n_rows * COLUMNS].view(n_rows, COLUMNS).sum(0)  # (COLUMNS)
    rest = words[n_rows * COLUMNS :]
    total = (columns * multipliers).sum() + (rest * multipliers[: len(rest)]).sum()
    if whole < n_bytes:
        tail = torch.zeros(8, dtype=torch.int8, device=tensor.device)
        tail[: n_bytes - whole] = content[whole:]
        total = total + tail.view(torch.int64)[0] * multipliers[-1]
    return total


def _layout(parameter: Tensor) -> tuple[int, int, int]:
    """Return the sharded axes of a parameter, the index of this rank's shard, and its copies."""
    layout, shard, n_copies = 0, 0, 1
    if isinstance(parameter, DTensor):
        sizes, coordinates = parameter.device_mesh.shape, _coordinates(parameter)
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Replicate):
                n_copies *= sizes[axis]
            else:
                layout |= 1 << axis
                shard = shard * sizes[axis] + coordinates[axis]
    return layout, shard, n_copies


def _gathered_weights(model: nn.Module) -> Iterator[Copy]:
    """Gather the weights of one FSDP module at a time and hash them.

    The gathered weights of all ranks are copies, apart from shards of tensor parallelism.
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        weights = partial(_own_parameters, module, f"{prefix}." if prefix else "")
        _, first = next(weights(), (None, None))  # the root of a middle pipeline stage has none
        if first is None or not _is_sharded(first):
            continue
        module.unshard()
        unique = {id(weight): (name, weight) for name, weight in reversed([*weights()])}
        for name, weight in unique.values():  # a tied weight is in it once, by its first name
            layout, shard = 0, 0
            local: Any = weight
            if isinstance(weight, DTensor):  # on the axis of tensor parallelism
                (placement,), (coordinate,) = weight.placements, _coordinates(weight)
                if not isinstance(placement, Replicate):
                    layout, shard = 1, coordinate
                local = weight.to_local()
            if is_traceable_wrapper_subclass(local):  # gathered in fp8
                parts = [getattr(local, each) for each in local.__tensor_flatten__()[0]]
            else:
                parts = [local]
            for part in parts:
                yield Copy(GATHERED, name, layout, shard, hash_tensor(part))
        module.reshard()


def _is_sharded(weight: Tensor) -> bool:
    """Return whether FSDP has sharded a parameter over more than one rank."""
    assert isinstance(weight, DTensor)
    names = weight.device_mesh.mesh_dim_names or ()
    axes = zip(names, weight.device_mesh.shape, weight.placements, strict=True)
    return any(
        name != "tp" and size > 1 and not isinstance(placement, Replicate)
        for name, size, placement in axes
    )


def _own_parameters(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of a module, without those of the FSDP modules inside it."""
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child, f"{prefix}{name}.")


def _coordinates(tensor: DTensor) -> Sequence[int]:
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None
    return coordinates


def _combine(hashes: Sequence[Tensor]) -> Tensor:
    """Return one hash of several."""
    stacked = torch.stack(list(hashes))  # (n)
    return (stacked * _multipliers(len(stacked), stacked.device)).sum()


def _multipliers(n: int, device: torch.device) -> Tensor:
    """Return n different odd numbers (n), int64."""
    return (2 * torch.arange(n, device=device) + 1) * _FIRST_MULTIPLIER


def _all_gather(
    hashes: Tensor, shards: Sequence[int], among: dist.ProcessGroup | None
) -> list[list[tuple[int, int]]]:
    """Return for each hash (n) the shard and the hash on every rank of a group."""
    local = torch.stack([torch.tensor(shards, device=hashes.device), hashes])  # (2, n)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(among))]
    dist.all_gather(gathered, local, group=among)
    by_tensor = torch.stack(gathered).permute(2, 0, 1).tolist()  # (n, ranks, 2)
    return [[(shard, value) for shard, value in ranks] for ranks in by_tensor]


def _deviating(values: Sequence[tuple[int, int]]) -> tuple[list[int], bool]:
    """Return the ranks whose hash differs from the majority of the ranks with the same shard.

    Args:
        values: Shard and hash of each rank.

    Returns:
        The ranks, and whether each group has a majority; all ranks of a group without one.
    """
    groups: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, (shard, value) in enumerate(values):
        groups[shard][rank] = value
    ranks, has_majority = [], True
    for group in groups.values():
        (value, count), *others = Counter(group.values()).most_common()
        if others:
            decided = 2 * count > len(group)
            ranks += [rank for rank, each in group.items() if each != value or not decided]
            has_majority = has_majority and decided
    return sorted(ranks), has_majority
