"""AdamW over all parameters once each, decay on matrices alone, fused like unfused."""

import copy

import pytest
import torch

from model.config import ModelConfig
from model.llama import Llama
from training.config import OptimConfig
from training.optimizer import build_optimizer

OPTIM = OptimConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)


def small(tied: bool = False) -> Llama:
    torch.manual_seed(0)
    return Llama(ModelConfig("small", 16, 1, 2, 1, 24, 20, tie_embeddings=tied))


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_once(tied: bool) -> None:
    model = small(tied)
    grouped = [p for group in build_optimizer(model, OPTIM).param_groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


def test_groups_have_the_configured_values() -> None:
    for group in build_optimizer(small(), OPTIM).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.9), 1e-6)


def test_decay_shrinks_matrices_and_leaves_vectors() -> None:
    """With gradients of zero AdamW's step is the decay alone: w · (1 - lr · decay)."""
    model = small()
    before = copy.deepcopy(dict(model.named_parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, OPTIM).step()
    for name, parameter in model.named_parameters():
        norm = name.endswith("norm.weight")
        factor = 1.0 if norm else 1 - OPTIM.lr * OPTIM.weight_decay
        torch.testing.assert_close(parameter, before[name] * factor, rtol=1e-6, atol=0)
        assert (parameter.ndim == 1) == norm


def test_fused_steps_equal_those_of_the_formula() -> None:
    """Kingma and Ba's formulas with Loshchilov and Hutter's decay, in float64."""
    model = small()
    optimizer = build_optimizer(model, OPTIM)
    assert optimizer.defaults["fused"]
    (b1, b2), states = OPTIM.betas, {}
    for name, p in model.named_parameters():
        states[name] = [
            p.detach().double(),
            torch.zeros_like(p).double(),
            torch.zeros_like(p).double(),
        ]
    for step in range(1, 4):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            w, m, v = states[name]
            m.lerp_(p.grad.double(), 1 - b1)
            v.lerp_(p.grad.double() ** 2, 1 - b2)
            decay = OPTIM.weight_decay if p.ndim >= 2 else 0.0
            w -= OPTIM.lr * decay * w
            w -= OPTIM.lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + OPTIM.eps)
        optimizer.step()
    for name, p in model.named_parameters():
        # Steps of 1e-2 on values up to 1 in float32: an error of 1e-7 each.
        torch.testing.assert_close(p.detach().double(), states[name][0], rtol=0, atol=1e-6)


def test_frozen_parameters_are_left_out() -> None:
    model = small()
    model.tok_embeddings.weight.requires_grad_(False)
    grouped = [p for group in build_optimizer(model, OPTIM).param_groups for p in group["params"]]
    assert id(model.tok_embeddings.weight) not in {id(p) for p in grouped}
