"""What follows from bad losses: pure decisions, which a stop at any step does not change."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.config import FaultsConfig
from resilience.event_log import Ledger
from resilience.loss_monitor import (
    WARM_UP,
    AsyncStatsReader,
    LossMonitor,
    MonitorAction,
    StepStats,
    not_finite,
    rewinds_of,
    union,
)

NAN, INF = math.nan, math.inf
SIZE = 16  # samples a batch


def vitals(batch: int, loss: float, grad_norm: float = 1.0) -> StepStats:
    """Of a run that has left out no batch."""
    return StepStats(batch + 1, batch, (batch * SIZE, (batch + 1) * SIZE), loss, grad_norm)


def verdicts(monitor: LossMonitor, losses: Sequence[float], first: int = 0) -> list[MonitorAction]:
    """The monitor's words on one batch after the other."""
    return [monitor.check(vitals(first + place, loss)) for place, loss in enumerate(losses)]


def noisy(n: int) -> list[float]:
    """Losses that fall from 4, with noise whose standard deviation is 0.1."""
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (4 - torch.arange(n) / n + 0.1 * noise).tolist()


# ---------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize(("loss", "norm"), [(NAN, NAN), (2.0, INF), (-INF, 1.0), (INF, NAN)])
def test_a_bad_step_is_told_with_its_values_and_samples(loss: float, norm: float) -> None:
    monitor = LossMonitor(FaultsConfig())
    verdicts(monitor, [3.0] * 811)
    verdict = monitor.check(vitals(811, loss, norm))
    assert verdict.told == (
        f"Step 812: loss {loss:g}, gradient norm {norm:g}: update skipped on all ranks "
        "(samples 12976 to 12991; 1 in a row, 1 in all)"
    )
    assert verdict.event == "skip" and verdict.fields is not None
    assert verdict.fields["samples"] == [12976, 12992] and verdict.fields["batch"] == 811
    assert verdict.rewind is None and verdict.abort is None


@pytest.mark.parametrize("in_a_row", [1, 2, 3])
def test_so_many_bad_steps_in_a_row_ask_for_a_rewind_past_all_of_them(in_a_row: int) -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=in_a_row))
    found = verdicts(monitor, [3.0, 3.0, *[NAN] * in_a_row])
    assert [verdict.rewind for verdict in found] == [None] * (1 + in_a_row) + [(2, 2 + in_a_row)]
    last = found[-1].told or ""
    assert f"(samples 32 to {31 + 16 * in_a_row})" in last and "(rewind 1 of 3)" in last


def test_a_good_step_ends_the_row() -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=3))
    found = verdicts(monitor, [NAN, NAN, 3.0, NAN, NAN, 3.0, NAN])
    assert all(verdict.rewind is None for verdict in found)
    assert "1 in a row, 5 in all" in (found[-1].told or "")


def test_a_row_that_goes_through_skipped_batches_is_left_out_as_a_whole() -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=2))
    verdicts(monitor, [3.0, NAN])
    assert monitor.check(vitals(9, NAN)).rewind == (1, 10)


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_after_the_last_rewind_the_run_ends(allowed: int) -> None:
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=2, max_rewinds=allowed))
    for rewind in range(allowed):
        first = 10 * rewind
        assert verdicts(monitor, [3.0, NAN, NAN], first)[-1].rewind == (first + 1, first + 3)
        monitor.reset_after_rewind(None)
    last = verdicts(monitor, [3.0, NAN, NAN], 100)[-1]
    assert last.rewind is None and last.abort is not None
    assert f"faults.max_rewinds ({allowed})" in last.abort
    assert "(samples 1616 to 1647)" in last.abort and "optim.lr" in last.abort


# ---------------------------------------------------------------- spikes


def test_a_loss_far_above_the_others_is_a_spike_and_no_other_is() -> None:
    """The noise is 0.1; the mean lags behind the slope of a nat in 400 steps by 0.25."""
    losses = noisy(400)
    losses[300] += 3.0
    losses[350] -= 2.0  # lower is no spike
    found = verdicts(LossMonitor(FaultsConfig(spike_threshold=8.0)), losses)
    assert [place for place, verdict in enumerate(found) if verdict.told] == [300]
    assert found[300].event == "spike" and found[300].rewind is None
    assert (found[300].told or "").startswith(f"Step 301: loss {losses[300]:.4g} is ")
    assert "(samples 4800 to 4815)" in (found[300].told or "")


def test_deviations_are_those_of_the_losses_before() -> None:
    """Against torch's own mean and standard deviation while all losses weigh the same."""
    losses = noisy(60)
    found = LossMonitor(FaultsConfig(spike_threshold=3.0))
    verdicts(found, losses)
    verdict = found.check(vitals(60, 9.0))
    before = torch.tensor(losses, dtype=torch.float64)
    expected = (9.0 - before.mean()) / before.std(correction=0)
    assert verdict.fields is not None
    assert verdict.fields["mean"] == pytest.approx(before.mean().item())
    assert verdict.fields["deviations"] == pytest.approx(expected.item(), abs=0.01)


def test_there_is_no_spike_during_the_warm_up_and_none_without_a_threshold() -> None:
    early = [*noisy(WARM_UP - 1), 100.0]
    assert all(verdict.told is None for verdict in verdicts(LossMonitor(FaultsConfig()), early))
    without = LossMonitor(FaultsConfig(spike_threshold=None))
    assert all(v.told is None for v in verdicts(without, [*noisy(100), 100.0]))


def test_bad_losses_stay_out_of_the_mean() -> None:
    clean, seen = LossMonitor(FaultsConfig()), LossMonitor(FaultsConfig())
    verdicts(clean, noisy(50))
    verdicts(seen, [*noisy(50), 100.0, NAN, 100.0])
    for key in ("mean", "variance", "seen"):
        assert seen.state_dict()[key] == clean.state_dict()[key]


def test_spikes_that_stay_are_the_new_level() -> None:
    monitor = LossMonitor(FaultsConfig())
    found = verdicts(monitor, [*noisy(50), *[9.0] * (WARM_UP + 100)])
    told = [place for place, verdict in enumerate(found) if verdict.told]
    assert told == list(range(50, 50 + WARM_UP))
    assert "the new level" in (found[told[-1]].told or "")
    assert monitor.state_dict()["mean"] == 9.0


def test_a_spike_is_rewound_where_asked_for_and_only_told_when_no_rewind_is_left() -> None:
    monitor = LossMonitor(FaultsConfig(rewind_on_spike=True, max_rewinds=1))
    verdicts(monitor, noisy(50))
    before = monitor.state_dict()
    verdict = monitor.check(vitals(50, 100.0))
    assert verdict.rewind == (50, 51) and "(rewind 1 of 1)" in (verdict.told or "")
    monitor.reset_after_rewind(before)
    last = monitor.check(vitals(51, 100.0))
    assert last.rewind is None and last.abort is None
    assert "no rewind is left of faults.max_rewinds (1)" in (last.told or "")


# ---------------------------------------------------------------- across stops


def test_a_stop_at_any_step_changes_no_verdict() -> None:
    """What is remembered goes through JSON, as in a checkpoint."""
    losses = [*noisy(30), 50.0, NAN, NAN, 3.0, NAN, *[9.0] * 25, NAN, NAN, NAN]
    config = FaultsConfig(max_rewinds=1)
    expected = verdicts(LossMonitor(config), losses)
    assert {v.event for v in expected} == {None, "skip", "spike"} and expected[-1].rewind
    for stop in range(len(losses)):
        first = LossMonitor(config)
        found = verdicts(first, losses[:stop])
        memory = json.loads(json.dumps(first.state_dict(), allow_nan=False))
        found += verdicts(LossMonitor(config, 0, memory), losses[stop:], stop)
        assert [str(v) for v in found] == [str(v) for v in expected]


def test_rewinds_are_read_back_from_the_ledger_and_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("start", step=0)
    monitor = LossMonitor(FaultsConfig(max_consecutive_skips=1))
    for batch in (3, 7):
        verdict = monitor.check(vitals(batch, NAN))
        ledger.append(str(verdict.event), **(verdict.fields or {}))
        ledger.append("rewind", skip=verdict.rewind, step=batch)
        monitor.reset_after_rewind(None)
    (tmp_path / "ledger.jsonl").open("ab").write(b'{"event": "rewind", "sk')  # torn by a kill
    rewinds = rewinds_of(ledger.read())
    assert rewinds == [(3, 4), (7, 8)]
    again = LossMonitor(FaultsConfig(max_consecutive_skips=1, max_rewinds=2), len(rewinds))
    assert again.check(vitals(20, NAN)).abort


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], ()),
        ([(5, 7), (1, 2)], ((1, 2), (5, 7))),
        ([(1, 3), (3, 4), (2, 6), (8, 9)], ((1, 6), (8, 9))),
        ([[1, 9], (2, 3)], ((1, 9),)),
    ],
)
def test_a_union_holds_the_same_batches_once(ranges: Any, expected: Any) -> None:
    assert union(ranges) == expected
    numbers = {n for first, stop in ranges for n in range(first, stop)}
    assert sorted(numbers) == [n for first, stop in union(ranges) for n in range(first, stop)]


# ---------------------------------------------------------------- from the device


@pytest.mark.parametrize(
    "values", [(1.0, 2.0), (0.0, 3e38), (NAN, 1.0), (1.0, INF), (-INF, 1.0), (INF, -INF)]
)
def test_not_finite_is_what_python_says(values: tuple[float, float]) -> None:
    found = not_finite(torch.tensor(values))
    assert found.dtype == torch.float32 and found.shape == ()
    assert found.item() == float(not all(map(math.isfinite, values)))


def values_of(step: int, device: str) -> torch.Tensor:
    return torch.tensor([float(step), 2.0 * step, 0, step % 2, 0], device=device)


def test_on_cpu_each_step_is_read_at_once() -> None:
    reader = AsyncStatsReader("cpu")
    for step in range(1, 4):
        (found,) = reader.read(step, step + 1, (10, 12), values_of(step, "cpu"))
        assert found == StepStats(step, step + 1, (10, 12), step, 2 * step, (0, step % 2, 0))
    assert reader.flush() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_each_step_is_read_one_late_and_the_last_by_drain() -> None:
    reader = AsyncStatsReader("cuda")
    found = [reader.read(step, step, (0, 1), values_of(step, "cuda")) for step in range(1, 5)]
    found.append(reader.flush())
    assert [[v.step for v in each] for each in found] == [[], [1], [2], [3], [4]]
    assert [v.loss for each in found for v in each] == [1.0, 2.0, 3.0, 4.0]
    reader.read(5, 5, (0, 1), values_of(5, "cuda"))
    reader.clear()
    assert reader.flush() == []
