"""AdamW: parameter groups, weight decay, moment formats and skipped steps."""

import copy
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.llama import Llama
from parallel.config import PrecisionConfig
from training.config import OptimConfig
from training.config_rules import MAX_BETA2_BF16, moment_errors
from training.optimizer import AdamW, StateFormat, build_optimizer

FORMATS: tuple[StateFormat, ...] = ("fp32", "bf16", "int8")
OPTIM = OptimConfig(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)


def small(tied: bool = False) -> Llama:
    torch.manual_seed(0)
    return Llama(ModelConfig("small", 16, 1, 2, 1, 24, 20, tie_embeddings=tied))


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_exactly_one_group(tied: bool) -> None:
    model = small(tied)
    grouped = [p for group in build_optimizer(model, OPTIM).param_groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


def test_groups_have_configured_values() -> None:
    for group in build_optimizer(small(), OPTIM).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.9), 1e-6)


def test_weight_decay_applies_to_matrices_only() -> None:
    """With zero gradients, an AdamW step is the decay alone: w · (1 - lr · decay)."""
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


def test_fused_steps_equal_adamw_formula() -> None:
    """Formulas of Kingma and Ba with the decay of Loshchilov and Hutter, in float64."""
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
        # Steps of 1e-2 on values up to 1 in float32 have an error of 1e-7 each.
        torch.testing.assert_close(p.detach().double(), states[name][0], rtol=0, atol=1e-6)


def test_frozen_parameters_are_excluded() -> None:
    model = small()
    model.tok_embeddings.weight.requires_grad_(False)
    grouped = [p for group in build_optimizer(model, OPTIM).param_groups for p in group["params"]]
    assert id(model.tok_embeddings.weight) not in {id(p) for p in grouped}


def test_steps_equal_torch_adamw_bit_for_bit() -> None:
    """Both call the same kernel on the same tensors."""
    model, other = small(), small()
    ours = build_optimizer(model, OPTIM)
    theirs = torch.optim.AdamW(build_optimizer(other, OPTIM).param_groups)
    for step in range(3):
        for each, optimizer in ((model, ours), (other, theirs)):
            set_gradients(each, step)
            optimizer.step()
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- low-bit moments


def wide() -> Llama:
    """Return a model whose matrices fill blocks and one of whose matrices has several chunks."""
    torch.manual_seed(0)
    return Llama(ModelConfig("wide", 64, 1, 2, 1, 96, 1100))


def set_gradients(model: Llama, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3


def stepped(state: StateFormat, steps: int) -> tuple[Llama, AdamW]:
    """Return a model after steps with fixed gradients and a different learning rate each."""
    model = wide()
    optimizer = build_optimizer(model, OPTIM, state)
    for step in range(steps):
        set_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
    return model, optimizer


def moment_bytes(optimizer: torch.optim.AdamW, parameter: torch.Tensor) -> dict[str, int]:
    """Return the bytes of each moment of a parameter."""
    found = {}
    for key in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[parameter][key]
        held = {"": value} if isinstance(value, torch.Tensor) else vars(value)
        found[key] = sum(
            each.nbytes
            for name, each in held.items()
            if isinstance(each, torch.Tensor) and name != "levels"  # the map is shared
        )
    return found


@pytest.mark.parametrize(("state", "size"), [("fp32", 4), ("bf16", 2), ("int8", 1 + 4 / 256)])
def test_matrix_moment_has_bytes_of_format(state: Any, size: float) -> None:
    """Vectors always have 4 bytes per value."""
    model, optimizer = stepped(state, 1)
    for parameter in model.parameters():
        expected = parameter.numel() * (size if parameter.ndim >= 2 else 4)
        assert set(moment_bytes(optimizer, parameter).values()) == {expected}


@pytest.mark.parametrize("state", ["bf16", "int8"])
def test_first_step_equals_float32_moments_bit_for_bit(state: Any) -> None:
    """It starts from zeros, which every format represents, and rounds only the stored result."""
    for found, expected in zip(
        stepped(state, 1)[0].parameters(), stepped("fp32", 1)[0].parameters(), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("state", "tolerance"), [("bf16", 0.01), ("int8", 0.03)])
def test_later_steps_are_close_to_float32_moments(state: Any, tolerance: float) -> None:
    """A step has the relative error of its moments: 0.2% per rounding in bf16, 1.1% in int8.

    Rounding errors of the second moment accumulate over its ten steps of memory: a factor of 3.
    """
    (model, _), (exact, _), start = stepped(state, 10), stepped("fp32", 10), wide()
    pairs = zip(model.parameters(), exact.parameters(), start.parameters(), strict=True)
    for found, expected, first in pairs:
        error = (found - expected).norm() / (expected - first).norm()
        assert error < tolerance
        assert (error > 0) == (found.ndim >= 2)  # moments of vectors are float32


@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_state_dict_of_any_format_loads_into_any_other(before: Any, after: Any) -> None:
    _, source = stepped(before, 3)
    saved = copy.deepcopy(source.state_dict())
    model, target = stepped(after, 1)
    target.load_state_dict(saved)
    found = target.state_dict()
    assert found["param_groups"] == saved["param_groups"]
    for number, state in saved["state"].items():
        for key, value in state.items():
            assert value.dtype == torch.float32 and value.shape == found["state"][number][key].shape
            if before == after or after == "fp32" or key == "step" or value.ndim == 1:
                assert torch.equal(found["state"][number][key], value)
            else:
                error = (found["state"][number][key] - value).norm() / value.norm()
                int8 = 0.015 if key == "exp_avg" else 0.01  # unsigned: twice the levels
                assert 0 < error < {"bf16": 2**-8, "int8": int8}[after]
    set_gradients(model, 3)
    target.step()


@pytest.mark.parametrize("beta2", [0.999, 1 - 0.9 * 2**-8, MAX_BETA2_BF16, 0.95])
def test_bf16_moment_error_appears_where_moments_stop_decaying(beta2: float) -> None:
    """Without gradients the second moment decays to zero, or rounding keeps it constant."""
    model = small()
    config = OptimConfig(lr=1e-2, betas=(0.9, beta2))
    found = list(moment_errors(PrecisionConfig(optimizer_state="bf16"), config))
    assert bool(found) == (beta2 > MAX_BETA2_BF16)
    optimizer = build_optimizer(model, config, "bf16")
    seen = []
    for step in range(300):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3 if step == 0 else 0.0)
        optimizer.step()
        seen.append(optimizer.state_dict()["state"][0]["exp_avg_sq"].clone())
    assert bool((seen[-1] == seen[-2]).all()) == bool(found)
    for problem in found:
        assert f"{beta2}" in problem and "precision.optimizer_state=fp32 or int8" in problem
        assert not list(moment_errors(PrecisionConfig(optimizer_state="int8"), config))


# ---------------------------------------------------------------- skipped steps

BAD = {"nan": torch.nan, "inf": torch.inf, "large": 3e38}


def step_with(model: Llama, optimizer: AdamW, step: int, bad: float | None) -> None:
    """Take one step; if `bad` is given, all gradients have this value and the step is skipped."""
    set_gradients(model, step)
    for parameter in model.parameters():
        if bad is not None:
            parameter.grad = torch.full_like(parameter, bad)
    optimizer.skip_if(torch.tensor(float(bad is not None)))
    optimizer.step()


def full_state(model: Llama, optimizer: AdamW) -> dict[str, Any]:
    """Return copies of weights, moments and step counts."""
    return copy.deepcopy({"model": model.state_dict(), "state": optimizer.state_dict()["state"]})


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("state", FORMATS)
def test_skipped_step_changes_no_bit_of_weights_moments_and_step_counts(
    state: StateFormat, bad: float
) -> None:
    model, optimizer = stepped(state, 3)
    before = full_state(model, optimizer)
    step_with(model, optimizer, 3, bad)
    torch.testing.assert_close(full_state(model, optimizer), before, rtol=0, atol=0)
    step_with(model, optimizer, 3, None)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(full_state(model, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize("state", FORMATS)
@pytest.mark.parametrize("skipped", [{0}, {0, 1, 3}, {2}], ids=str)
def test_steps_around_skipped_ones_equal_run_without_them(
    state: StateFormat, skipped: set[int]
) -> None:
    """This includes the first step, before which there are no moments."""
    models, optimizers = [], []
    for with_skips in (True, False):
        model = wide()
        optimizer = build_optimizer(model, OPTIM, state)
        for step in range(5):
            if with_skips or step not in skipped:
                step_with(model, optimizer, step, torch.nan if step in skipped else None)
        models.append(model)
        optimizers.append(optimizer)
    found, expected = (full_state(*pair) for pair in zip(models, optimizers, strict=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("state", FORMATS)
def test_skip_applies_to_one_step_only(state: StateFormat) -> None:
    model = wide()
    optimizer = build_optimizer(model, OPTIM, state)
    step_with(model, optimizer, 0, torch.nan)
    set_gradients(model, 1)
    optimizer.step()
    fresh = wide()
    set_gradients(fresh, 1)
    build_optimizer(fresh, OPTIM, state).step()
    for found, expected in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_unfused_step_is_skipped_by_host(skip: float) -> None:
    model = wide()
    optimizer = build_optimizer(model, OPTIM)
    for group in optimizer.param_groups:
        group["fused"] = False
    before = copy.deepcopy(model.state_dict())
    set_gradients(model, 0)
    optimizer.skip_if(torch.tensor(skip))
    optimizer.step()
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert same == bool(skip)
