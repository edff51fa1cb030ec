"""The table of published runs is complete, consistent and has a fitted and a held-out part."""

import re
from collections import Counter
from datetime import date

import pytest
from published_runs import CHECKPOINTS, MODELS, REPORTS, SETS, STACKS, PublishedRun, load_runs

from planning.hardware import known_hardware, load_hardware

RUNS = load_runs()


def problems(run: PublishedRun) -> list[str]:
    """Return what contradicts itself in a run."""
    checkpoint = run.activation_checkpoint or "none"
    numbers = [value for value in vars(run).values() if type(value) in (int, float)]
    model = MODELS[run.model]
    rules = {
        "devices are the product of the mesh": run.devices
        == run.dp_replicate * run.dp_shard * run.cp * run.tp * run.pp,
        "numbers are positive": all(value > 0 for value in numbers),
        "hardware is known": run.hardware in known_hardware(),
        "checkpointing is known": checkpoint in CHECKPOINTS
        or re.fullmatch(r"layers:\d+|ops:[a-z]+(\+[a-z]+)*", checkpoint) is not None,
        "tp divides the heads": model.n_kv_heads % run.tp == 0,
        "one device shards nothing": run.sharding != "none" or run.dp_shard * run.cp == 1,
        "compile is in the stack": not run.compile or "compile" in REPORTS[run.report].stack,
        "tp overlap needs tp": run.tp > 1 or not run.async_tp,
    }
    return [f"{run.id}: {rule}" for rule, holds in rules.items() if not holds]


def test_published_runs_are_consistent() -> None:
    assert [problem for run in RUNS for problem in problems(run)] == []
    assert max(Counter(run.id for run in RUNS).values()) == 1
    assert {run.report for run in RUNS} == set(REPORTS)
    assert {run.model for run in RUNS} == set(MODELS)


@pytest.mark.parametrize("name", REPORTS)
def test_each_report_names_its_source(name: str) -> None:
    report = REPORTS[name]
    assert report.url.startswith("https://") and report.stack in STACKS
    assert date(2020, 1, 1) < date.fromisoformat(report.published)
    assert report.document and report.tokens_per_second


def test_enough_usable_runs_are_fitted_and_held_out() -> None:
    counts = Counter(run.set for run in RUNS if run.usable)
    assert set(counts) == set(SETS) and counts["held_out"] >= 25 and counts["fit"] >= 25


def test_model_flops_are_below_the_peak_of_the_device() -> None:
    """At least 4% and at most 90% of the peak: a misread number or shape is usually outside."""
    for run in RUNS:
        peaks = load_hardware(run.hardware).peak_tflops
        peak = peaks["fp8"] if run.fp8 != "none" else peaks["bf16"]
        model = MODELS[run.model].config
        weights = model.dim * (
            model.n_layers * (2 * model.dim + 2 * model.n_kv_heads * model.head_dim)
            + 3 * model.n_layers * model.ffn_dim
            + model.vocab_size
        )
        flops = 6 * weights + 6 * model.n_layers * model.dim * run.seq_len
        assert 0.04 < flops * run.tokens_per_second / (peak * 1e12) < 0.9, run.id
