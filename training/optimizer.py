"""AdamW with weight-decay groups and moments stored in float32, bf16 or 8 bits.

AdamW is elementwise, so each rank updates its local shards, independently of the mesh. The storage
formats of low-bit moments are in `training.moments`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from checkpoint.host_copy import DeferredTensor
from training.config import OptimConfig
from training.moments import BLOCK, FloatMoment, Int8Moment, Moment

Group = dict[str, Any]  # parameters with their options, as torch.optim keeps them
StateFormat = Literal["fp32", "bf16", "int8"]

# Values of low-bit moments converted to float32 at a time; on CPU a chunk should fit in the cache.
_CHUNK_CPU, _CHUNK_DEVICE = 2**8 * BLOCK, 2**17 * BLOCK


def build_optimizer(model: nn.Module, config: OptimConfig, state: StateFormat = "fp32") -> "AdamW":
    """Return `optim.optimizer` with weight decay on matrices and none on vectors (norm weights).

    On CPU and CUDA AdamW is fused: one kernel instead of a dozen passes over the states.

    Args:
        state: Format of the two moments: 8, 4 or 2 bytes per parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    match config.optimizer:
        case "adamw" if state == "fp32":
            return AdamW(groups, fused=fused, **options)
        case "adamw":
            return LowBitAdamW(groups, state, fused=fused, **options)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW on local shards, with steps that can be skipped on the device.

    The kernel is called without DTensor, whose dispatch takes longer than the kernel on a small
    model. State dicts equal torch.optim.AdamW's: moments are sharded like their parameter.
    """

    _found_inf: Tensor | None = None

    def skip_if(self, found_inf: Tensor) -> None:
        """Skip the next step if `found_inf` is 1.

        A skipped step leaves weights, moments and step counts bit-identical. The fused kernel
        reads the value, so the host does not wait for the device.

        Args:
            found_inf: Float32 scalar on the parameters' device, 0 or 1.
        """
        self._found_inf = found_inf

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        found_inf, self._found_inf = self._found_inf, None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self._init_state(parameter)
            if found_inf is None or group["fused"]:
                self._update(parameters, group, found_inf)
            elif not found_inf.item():  # only the fused kernel accepts found_inf
                self._update(parameters, group, None)

    def _init_state(self, parameter: Tensor) -> None:
        moments = {key: self._moment(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}

    def _moment(self, parameter: Tensor, key: str) -> Any:
        return torch.zeros_like(parameter)

    def _update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        states = [self.state[parameter] for parameter in parameters]
        _adamw(
            group,
            found_inf,
            weights=[_local(parameter) for parameter in parameters],
            gradients=[_local(parameter.grad) for parameter in parameters],
            exp_avgs=[_local(state["exp_avg"]) for state in states],
            exp_avg_sqs=[_local(state["exp_avg_sq"]) for state in states],
            steps=[state["step"] for state in states],
        )


class LowBitAdamW(AdamW):
    """AdamW with moments stored in bf16 or 8 bits and computed in float32.

    For each chunk, the moments are converted to float32, torch's kernel updates them, and they are
    converted back. Moments of vectors stay float32: there are few, and each value affects a whole
    channel. State dicts equal torch.optim.AdamW's, with float32 moments sharded like their
    parameter, so a checkpoint loads on any mesh and with any format.
    """

    def __init__(self, groups: Any, state: Literal["bf16", "int8"], **options: Any) -> None:
        self.format = state
        self._convert: Callable[[Moment, Tensor], Any] = _to_float32
        super().__init__(groups, **options)

    def _update(self, parameters: list[Tensor], group: Group, found_inf: Tensor | None) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            weights = _local(parameter).view(-1)  # (local numel)
            gradient = _local(parameter.grad).reshape(-1)  # (local numel)
            chunk_size = _CHUNK_CPU if weights.device.type == "cpu" else _CHUNK_DEVICE
            for start in range(0, len(weights), chunk_size):
                stop = min(start + chunk_size, len(weights))
                exp_avg = state["exp_avg"].read(start, stop)
                exp_avg_sq = state["exp_avg_sq"].read(start, stop)
                _adamw(
                    group,
                    found_inf,
                    weights=[weights[start:stop]],
                    gradients=[gradient[start:stop]],
                    exp_avgs=[exp_avg],
                    exp_avg_sqs=[exp_avg_sq],
                    steps=[state["step"].clone()],  # the kernel increments it in place
                )
                # A skipped step writes the values that it read.
                state["exp_avg"].write(start, exp_avg)
                state["exp_avg_sq"].write(start, exp_avg_sq)
            state["step"] += 1 if found_inf is None else 1 - found_inf

    def _moment(self, parameter: Tensor, key: str) -> Moment:
        """Return a zero moment for this rank's shard."""
        local = _local(parameter)
        if parameter.ndim >= 2 and self.format == "int8":
            return Int8Moment(local.numel(), signed=key == "exp_avg", device=local.device)
        dtype = torch.bfloat16 if parameter.ndim >= 2 else torch.float32
        return FloatMoment(local.numel(), dtype, local.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of torch.optim.AdamW with float32 moments on the CPU.

        In float32, the moments may not fit into device memory next to the model.
        """
        state_dict = super().state_dict()
        for index, parameter in enumerate(self._parameters()):
            if index in state_dict["state"]:
                state_dict["state"][index] = {
                    key: value if isinstance(value, Tensor) else self._convert(value, parameter)
                    for key, value in state_dict["state"][index].items()
                }
        return state_dict

    @contextmanager
    def deferred_moments(self) -> Iterator[None]:
        """Let `state_dict` return moments as `DeferredTensor`, for a single copy to host memory."""
        self._convert = _deferred
        yield
        self._convert = _to_float32

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict saved with any moment format."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        steps = {key: {"step": state["step"]} for key, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": steps})
        for parameter_key, parameter in zip(keys, self._parameters(), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                moment = self._moment(parameter, key)
                values = _local(state_dict["state"][parameter_key][key]).reshape(-1)
                moment.write(0, values.to(parameter.device))
                self.state[parameter][key] = moment

    def _parameters(self) -> list[Tensor]:
        """Return all parameters in the order of state dicts."""
        return list(chain.from_iterable(group["params"] for group in self.param_groups))


def _adamw(
    group: Group,
    found_inf: Tensor | None,
    *,
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
) -> None:
    """Call torch's AdamW kernel on plain tensors, in place; a `found_inf` of 1 is a no-op."""
    names = ("lr", "weight_decay", "eps", "fused", "amsgrad", "maximize")
    options = {name: group[name] for name in names} | {"foreach": False, "found_inf": found_inf}
    options["beta1"], options["beta2"] = group["betas"]
    adamw(weights, gradients, exp_avgs, exp_avg_sqs, [], steps, **options)
    # The fused kernel does not increment the version, which `parallel.mixed_precision` checks.
    torch.autograd.graph.increment_version(weights)


def _local(tensor: Tensor | None) -> Tensor:
    """Return this rank's shard, detached."""
    assert tensor is not None
    # Detached last, because DTensor.detach goes through the DTensor dispatch.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _deferred(moment: Moment, parameter: Tensor) -> DeferredTensor:
    """Return a moment that is converted to float32 when it is copied."""
    local = _local(parameter)
    return DeferredTensor(parameter, lambda: moment.read(0, local.numel()).view(local.shape))


def _to_float32(moment: Moment, parameter: Tensor) -> Tensor:
    """Return a moment in float32 on the CPU, with its parameter's shape and placements."""
    local = _local(parameter)
    values = moment.read(0, local.numel()).view(local.shape)
    if isinstance(parameter, DTensor):
        layout: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
        values = DTensor.from_local(values, parameter.device_mesh, parameter.placements, **layout)
    return values.cpu()
