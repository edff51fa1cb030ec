"""The loss monitor detects bad steps; its decisions are the same after a restart at any step."""

import json
import math
from collections.abc import Sequence

import pytest
import torch

from parallel.step_scalars import StepRequests
from resilience.config import FaultsConfig
from resilience.loss_monitor import (
    WARMUP_STEPS,
    AsyncStatsReader,
    LossMonitor,
    MonitorAction,
    StepStats,
    not_finite,
)

NAN, INF = math.nan, math.inf
BATCH_SIZE = 16


def stats(batch: int, loss: float, grad_norm: float = 1.0) -> StepStats:
    """Return the statistics of a batch in a run that has excluded no batch."""
    samples = batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE
    return StepStats(batch + 1, batch, samples, loss, grad_norm)


def check_all(monitor: LossMonitor, losses: Sequence[float], first: int = 0) -> list[MonitorAction]:
    """Check consecutive batches, starting with index `first`."""
    return [monitor.check(stats(batch, loss)) for batch, loss in enumerate(losses, start=first)]


def noisy_losses(n: int) -> list[float]:
    """Return losses that decrease from 4 to 3, with noise of standard deviation 0.1."""
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (4 - torch.arange(n) / n + 0.1 * noise).tolist()


# ---------------------------------------------------------------- non-finite values


@pytest.mark.parametrize(("loss", "norm"), [(NAN, NAN), (2.0, INF), (-INF, 1.0), (INF, NAN)])
def test_skipped_step_reports_loss_norm_and_samples(loss: float, norm: float) -> None:
    monitor = LossMonitor(FaultsConfig())
    check_all(monitor, [3.0] * 811)
    action = monitor.check(stats(811, loss, norm))
    assert action.message == (
        f"Step 812: skipped the update on all ranks: loss {loss:g}, gradient norm {norm:g} "
        "(samples 12976 to 12991; 1 consecutive, 1 in total)"
    )
    assert action.event == "skip" and action.fields is not None
    assert action.fields["samples"] == [12976, 12992] and action.fields["batch"] == 811
    assert json.dumps(action.fields)
    assert action.rewind is None and action.abort is None


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_max_consecutive_skips_triggers_a_rewind_excluding_all_of_them(limit: int) -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=limit))
    actions = check_all(monitor, [3.0, 3.0, *[NAN] * limit])
    assert [action.rewind for action in actions] == [None] * (1 + limit) + [(2, 2 + limit)]
    last = actions[-1].message or ""
    assert f"(samples 32 to {31 + 16 * limit})" in last and "(rewind 1 of 3)" in last


def test_finite_step_resets_the_count_of_consecutive_skips() -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=3))
    actions = check_all(monitor, [NAN, NAN, 3.0, NAN, NAN, 3.0, NAN])
    assert all(action.rewind is None for action in actions)
    assert "1 consecutive, 5 in total" in (actions[-1].message or "")


def test_rewind_covers_batches_excluded_within_the_skipped_sequence() -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=2))
    check_all(monitor, [3.0, NAN])
    assert monitor.check(stats(9, NAN)).rewind == (1, 10)


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_run_aborts_after_the_last_allowed_rewind(allowed: int) -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=2, max_rewinds=allowed))
    for rewind in range(allowed):
        first = 10 * rewind
        assert check_all(monitor, [3.0, NAN, NAN], first)[-1].rewind == (first + 1, first + 3)
        monitor.restore(None, monitor.n_rewinds + 1)
    last = check_all(monitor, [3.0, NAN, NAN], 100)[-1]
    assert last.rewind is None and last.abort is not None
    assert f"faults.max_rewinds={allowed} " in last.abort
    assert "(samples 1616 to 1647)" in last.abort and "optim.lr" in last.abort


def test_run_without_a_finite_step_blames_the_initial_weights() -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=3, max_rewinds=0))
    *_, last = check_all(monitor, [NAN, NAN, INF])
    assert "the initial weights (run.init_from) compute values" in (last.abort or "")
    assert "optim.lr" not in (last.abort or "")
    assert monitor.has_skipped_all(3) and not monitor.has_skipped_all(4)
    assert not LossMonitor(FaultsConfig()).has_skipped_all(0)


# ---------------------------------------------------------------- spikes


def test_only_a_loss_far_above_the_mean_is_a_spike() -> None:
    """The noise is 0.1; the mean lags behind a slope of 1 nat in 400 steps by 0.25."""
    losses = noisy_losses(400)
    losses[300] += 3.0
    losses[350] -= 2.0  # a lower loss is not a spike
    actions = check_all(LossMonitor(FaultsConfig(spike_threshold=8.0)), losses)
    assert [index for index, action in enumerate(actions) if action.message] == [300]
    assert actions[300].event == "spike" and actions[300].rewind is None
    assert (actions[300].message or "").startswith(f"Step 301: loss {losses[300]:.4g} is ")
    assert "(samples 4800 to 4815)" in (actions[300].message or "")


def test_deviations_match_torch_mean_and_std_of_previous_losses() -> None:
    """Holds while all losses still have the same weight."""
    losses = noisy_losses(60)
    monitor = LossMonitor(FaultsConfig(spike_threshold=3.0))
    check_all(monitor, losses)
    action = monitor.check(stats(60, 9.0))
    previous = torch.tensor(losses, dtype=torch.float64)
    expected = (9.0 - previous.mean()) / previous.std(correction=0)
    assert action.fields is not None
    assert action.fields["mean"] == pytest.approx(previous.mean().item())
    assert action.fields["deviations"] == pytest.approx(expected.item(), abs=0.01)


def test_no_spike_during_warmup_or_without_threshold() -> None:
    early = [*noisy_losses(WARMUP_STEPS - 1), 100.0]
    assert all(action.message is None for action in check_all(LossMonitor(FaultsConfig()), early))
    monitor = LossMonitor(FaultsConfig(spike_threshold=None))
    assert all(a.message is None for a in check_all(monitor, [*noisy_losses(100), 100.0]))


def test_bad_losses_are_excluded_from_the_running_mean() -> None:
    clean, with_bad = LossMonitor(FaultsConfig()), LossMonitor(FaultsConfig())
    check_all(clean, noisy_losses(50))
    check_all(with_bad, [*noisy_losses(50), 100.0, NAN, 100.0])
    for key in ("mean", "variance", "n_losses"):
        assert with_bad.state_dict()[key] == clean.state_dict()[key]


def test_persistent_spikes_become_the_new_baseline() -> None:
    monitor = LossMonitor(FaultsConfig())
    actions = check_all(monitor, [*noisy_losses(50), *[9.0] * (WARMUP_STEPS + 100)])
    reported = [index for index, action in enumerate(actions) if action.message]
    assert reported == list(range(50, 50 + WARMUP_STEPS))
    assert "the new baseline" in (actions[reported[-1]].message or "")
    assert monitor.state_dict()["mean"] == 9.0


def test_rewind_on_spike_rewinds_until_max_rewinds_then_only_reports() -> None:
    monitor = LossMonitor(FaultsConfig(rewind_on_spike=True, max_rewinds=1))
    check_all(monitor, noisy_losses(50))
    state = monitor.state_dict()
    action = monitor.check(stats(50, 100.0))
    assert action.rewind == (50, 51) and "(rewind 1 of 1)" in (action.message or "")
    monitor.restore(state, n_rewinds=1)
    last = monitor.check(stats(51, 100.0))
    assert last.rewind is None and last.abort is None
    assert "faults.max_rewinds=1 allows no further rewind" in (last.message or "")


# ---------------------------------------------------------------- across launches


def test_actions_are_the_same_if_the_run_stops_at_any_step() -> None:
    """The state is saved as JSON, as in a checkpoint."""
    losses = [*noisy_losses(30), 50.0, NAN, NAN, 3.0, NAN, *[9.0] * 25, NAN, NAN, NAN]
    config = FaultsConfig(max_rewinds=1)
    expected = check_all(LossMonitor(config), losses)
    assert {a.event for a in expected} == {None, "skip", "spike"} and expected[-1].rewind
    for stop in range(len(losses)):
        monitor = LossMonitor(config)
        actions = check_all(monitor, losses[:stop])
        state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
        actions += check_all(LossMonitor(config, 0, state), losses[stop:], stop)
        assert [str(a) for a in actions] == [str(a) for a in expected]


def test_state_of_checkpoints_of_0_1_is_loaded() -> None:
    old = {
        **{"skipped": 5, "in_a_row": 2, "row_batch": 7, "row_sample": 112},
        **{"seen": 30, "mean": 2.5, "variance": 0.25, "spikes_in_a_row": 3},
    }
    assert LossMonitor(FaultsConfig(), state=old).state_dict() == {
        **{"n_skipped": 5, "n_consecutive": 2, "first_batch": 7, "first_sample": 112},
        **{"n_losses": 30, "mean": 2.5, "variance": 0.25, "n_consecutive_spikes": 3},
    }
    monitor = LossMonitor(FaultsConfig())
    monitor.restore(old, n_rewinds=0)
    assert monitor.check(stats(9, NAN)).rewind == (7, 10)


# ---------------------------------------------------------------- reading from the device


@pytest.mark.parametrize(
    "values", [(1.0, 2.0), (0.0, 3e38), (NAN, 1.0), (1.0, INF), (-INF, 1.0), (INF, -INF)]
)
def test_not_finite_matches_math_isfinite(values: tuple[float, float]) -> None:
    found = not_finite(torch.tensor(values))
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == float(not all(map(math.isfinite, values)))


def scalars(step: int, device: str) -> torch.Tensor:
    return torch.tensor([float(step), 2.0 * step, 0, step % 2, 0, 0, 0], device=device)


def test_cpu_statistics_are_read_immediately() -> None:
    reader = AsyncStatsReader("cpu")
    for step in range(1, 4):
        (found,) = reader.read(step, step + 1, (10, 12), scalars(step, "cpu"))
        requests = StepRequests(terminated=step % 2)
        assert found == StepStats(step, step + 1, (10, 12), step, 2 * step, requests)
    assert reader.flush() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_statistics_are_read_one_step_late_and_the_last_by_flush() -> None:
    reader = AsyncStatsReader("cuda")
    found = [reader.read(step, step, (0, 1), scalars(step, "cuda")) for step in range(1, 5)]
    found.append(reader.flush())
    assert [[s.step for s in each] for each in found] == [[], [1], [2], [3], [4]]
    assert [s.loss for each in found for s in each] == [1.0, 2.0, 3.0, 4.0]
    reader.read(5, 5, (0, 1), scalars(5, "cuda"))
    reader.flush()
    assert reader.flush() == []
