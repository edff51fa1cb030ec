"""The optimizer: AdamW with decay groups, its moments kept in float32, bf16 or 8 bits.

AdamW is elementwise, so it works on each rank's shard alone, whatever mesh it lies on. How a
moment is kept in fewer bits is in `training.moments`.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from training.config import OptimConfig
from training.moments import BLOCK, FloatMoment, Int8Moment, Moment

StateFormat = Literal["fp32", "bf16", "int8"]

# Values that are widened to float32 at a time; on CPU they should stay in the cache.
_PIECE_CPU, _PIECE_DEVICE = 2**8 * BLOCK, 2**17 * BLOCK


def build_optimizer(model: nn.Module, config: OptimConfig, state: StateFormat = "fp32") -> "AdamW":
    """AdamW with weight decay on matrices and none on vectors (the norms' weights).

    Fused on CPUs and CUDA devices: one kernel instead of a dozen passes over the states.

    Args:
        state: How the two moments are kept: 8, 4 or 2 bytes a parameter.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "fused": parameters[0].device.type in ("cpu", "cuda"),
    }
    return AdamW(groups, **options) if state == "fp32" else NarrowAdamW(groups, state, **options)


class AdamW(torch.optim.AdamW):
    """torch's AdamW on the local shards, with a step that can be made to change nothing.

    Its kernel is called without DTensor, whose dispatch takes longer than the kernel on a small
    model. State dicts are those of torch's AdamW: moments are placed like their parameter.
    """

    _skip: Tensor | None = None

    def skip_if(self, found_inf: Tensor) -> None:
        """Makes the next step, and that one alone, change nothing if `found_inf` is 1.

        Weights, moments and step counts stay bit for bit: the kernel reads the value and leaves.
        The host does not wait for it.

        Args:
            found_inf: A float32 scalar on the parameters' device, 0 or 1.
        """
        self._skip = found_inf

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        assert closure is None
        skip, self._skip = self._skip, None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self._begin(parameter)
            if skip is None or group["fused"]:
                self._update(parameters, group, skip)
            elif not skip.item():  # only the fused kernel can look by itself
                self._update(parameters, group, None)

    def _begin(self, parameter: Tensor) -> None:
        """The state before a parameter's first step."""
        self.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def _update(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        """The step of a group's parameters, all in one kernel."""
        states = [self.state[parameter] for parameter in parameters]
        _adamw(
            group,
            [_local(parameter) for parameter in parameters],
            [_local(parameter.grad) for parameter in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
            skip,
        )


class NarrowAdamW(AdamW):
    """AdamW whose moments are kept in bf16 or 8 bits, and computed with in float32.

    Piece by piece the moments are widened, torch's own kernel makes the step, and they are narrowed
    again. Vectors, of which there are few and each value counts for a whole channel, keep float32.
    State dicts are those of torch's AdamW, with float32 moments placed like their parameter: a
    checkpoint loads on any mesh and under any format.
    """

    def __init__(self, groups: Any, state: Literal["bf16", "int8"], **options: Any) -> None:
        self.format = state
        super().__init__(groups, **options)

    def _begin(self, parameter: Tensor) -> None:
        self.state[parameter] = {"step": torch.zeros((), device=parameter.device)}
        for key in ("exp_avg", "exp_avg_sq"):
            self.state[parameter][key] = self._moment(parameter, key)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            self._update_one(parameter, state, group, skip)
            state["step"] += 1 if skip is None else 1 - skip

    def _update_one(
        self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], skip: Tensor | None
    ) -> None:
        """One parameter's step on this rank's shard; what a skipped step reads it writes again."""
        weights = _local(parameter).view(-1)  # (local size)
        gradient = _local(parameter.grad).reshape(-1)  # (local size)
        piece = _PIECE_CPU if weights.device.type == "cpu" else _PIECE_DEVICE
        for start in range(0, len(weights), piece):
            stop = min(start + piece, len(weights))
            first, second = (
                state["exp_avg"].read(start, stop),
                state["exp_avg_sq"].read(start, stop),
            )
            count = state["step"].clone()  # which the kernel counts up
            own = slice(start, stop)
            _adamw(group, [weights[own]], [gradient[own]], [first], [second], [count], skip)
            state["exp_avg"].write(start, first)
            state["exp_avg_sq"].write(start, second)

    def _moment(self, parameter: Tensor, key: str) -> Moment:
        """A moment of zeros for this rank's shard."""
        local = _local(parameter)
        if parameter.ndim >= 2 and self.format == "int8":
            return Int8Moment(local.numel(), signed=key == "exp_avg", device=local.device)
        dtype = torch.bfloat16 if parameter.ndim >= 2 else torch.float32
        return FloatMoment(local.numel(), dtype, local.device)

    def state_dict(self) -> dict[str, Any]:
        """As of torch's AdamW; the moments lie on the CPU, as they may not fit beside the model."""
        packed = super().state_dict()
        for number, parameter in enumerate(self._parameters()):
            if number in packed["state"]:
                packed["state"][number] = {
                    key: value if isinstance(value, Tensor) else _widened(value, parameter)
                    for key, value in packed["state"][number].items()
                }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave, here or under another format."""
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        steps = {name: {"step": of["step"]} for name, of in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": steps})
        for name, parameter in zip(names, self._parameters(), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                moment = self._moment(parameter, key)
                values = _local(state_dict["state"][name][key]).reshape(-1)
                moment.write(0, values.to(parameter.device))
                self.state[parameter][key] = moment

    def _parameters(self) -> list[Tensor]:
        """Every parameter, in the order of state dicts."""
        return list(chain.from_iterable(group["params"] for group in self.param_groups))


def _adamw(
    group: dict[str, Any],
    weights: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    skip: Tensor | None,
) -> None:
    """torch's kernel on plain tensors, in place; with `skip` of 1 it changes none of them."""
    adamw(
        weights,
        gradients,
        first,
        second,
        [],
        steps,
        foreach=False,
        fused=group["fused"],
        found_inf=skip,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    # The fused kernel does not say that it wrote; `parallel.mixed_precision` looks for it.
    torch.autograd.graph.increment_version(weights)


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's shard, without a history."""
    assert tensor is not None
    # Detached afterwards: that of a DTensor goes through its dispatch.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _widened(moment: Moment, parameter: Tensor) -> Tensor:
    """A moment in float32 on the CPU, shaped and placed like its parameter."""
    local = _local(parameter)
    values = moment.read(0, local.numel()).view(local.shape)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        values = DTensor.from_local(
            values, mesh, placements, shape=parameter.shape, stride=parameter.stride()
        )
    return values.cpu()
