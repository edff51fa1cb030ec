"""Time limits of the watchdog follow from the plan, and configured ones are checked against it."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir

from cli.arguments import CONF, hydra_arguments
from cli.config import load_train_config
from parallel.mesh import MeshShape
from planning import fit_check
from planning.fit_check import check_plan, watchdog_limits
from planning.hardware import load_hardware
from planning.request import PlanRequest, configured_choice
from planning.time_limits import LEAST, limit_warnings, planned_seconds, time_limits
from resilience.config import TimeLimits, WatchdogConfig
from resilience.processes import Processes
from training.config import JobConfig

ONE_GPU, ONE_RANK = Processes("cuda", 1, 1, "self"), MeshShape(1, 1, 1, 1)
# 4M tokens a step on one GPU, which takes minutes.
LARGE = ("experiment=h200_8b", "train.global_batch_size=512")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(autouse=True)
def _on_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = load_hardware("h200")
    monkeypatch.setattr(fit_check, "this_machine", lambda _: (hardware, 2**37))
    monkeypatch.setattr(fit_check, "machine_memory", lambda: 2**38)


def trained(*arguments: str) -> JobConfig:
    return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def limits(*arguments: str) -> TimeLimits:
    return watchdog_limits(trained(*arguments), ONE_GPU, ONE_RANK)


def test_limits_are_ten_times_the_plan_and_at_least_those_of_a_small_run() -> None:
    assert limits("experiment=smoke") == LEAST
    large = limits(*LARGE)
    config = trained(*LARGE)
    [(spec, _)] = PlanRequest(config, "cuda", 1).stages(configured_choice(config, ONE_RANK))
    planned = planned_seconds([spec], load_hardware("h200"))
    assert planned.step > 400  # against the 600 seconds of a constant limit
    assert large.step == round(10 * planned.step)
    assert large.setup == round(10 * planned.setup) > large.step
    # 12 bytes per parameter, at 0.5 GB/s
    assert planned.checkpoint == pytest.approx(12 * 8.03 / 0.5, rel=0.01)
    assert large.checkpoint == round(10 * planned.checkpoint) > LEAST.checkpoint


def test_configured_limits_replace_the_plan_and_off_disables_them() -> None:
    given = limits(*LARGE, "watchdog.step_seconds=700", "watchdog.setup_seconds=off")
    assert (given.step, given.setup) == (700, math.inf)
    assert given.checkpoint == 1927  # null, as a config.yaml of an older version has it
    assert str(given) == "set-up off, step 700 s, checkpoint 1,927 s"
    assert "Infinity" not in json.dumps(str(given))


@pytest.mark.parametrize("phase", ["setup", "step", "checkpoint"])
def test_limit_near_the_plan_is_reported_with_remedies_that_work(phase: str) -> None:
    key, config = f"watchdog.{phase}_seconds", trained(*LARGE)

    def report(limit: Any) -> str:
        watchdog = WatchdogConfig(**{f"{phase}_seconds": limit})
        return check_plan(replace(config, watchdog=watchdog), ONE_GPU, ONE_RANK) or ""

    lines = report(50).splitlines()
    [warning] = [line for line in lines if line.startswith("Warning: ")]
    assert f"{key}=50 is less than 2 times the planned " in warning
    null, derived = re.findall(rf"use {key}=(null), which is (\d+) here, or off", warning)[0]
    assert null == "null"
    for remedy in (None, float(derived), "off"):
        assert "(fits)" in report(remedy) and "Warning" not in report(remedy)
    assert getattr(watchdog_limits(config, ONE_GPU, ONE_RANK), phase) == float(derived)


def test_longest_stage_decides() -> None:
    config = trained("experiment=llama3_8b_paper")
    choice = configured_choice(config, MeshShape(1, 128, 1, 1))
    specs = [spec for spec, _ in PlanRequest(config, "cuda", 2**60).stages(choice)]
    hardware = load_hardware("h100")
    each = [planned_seconds([spec], hardware).step for spec in specs]
    assert planned_seconds(specs, hardware).step == max(each) > each[0]


def test_unknown_device_is_planned_as_the_slowest_known_one() -> None:
    config = trained(*LARGE)
    [(spec, _)] = PlanRequest(config, "cuda", 1).stages(configured_choice(config, ONE_RANK))
    slowest = planned_seconds([spec], None)
    assert slowest.step > planned_seconds([spec], load_hardware("h100")).step
    cpu = replace(spec, accelerator="cpu", precision=replace(spec.precision, param="fp32"))
    limit = time_limits(WatchdogConfig(), planned_seconds([cpu], None)).step
    assert limit > 24 * 3600  # 8B on a small CPU: slow, but not hung
    assert not list(limit_warnings(WatchdogConfig(), slowest))


@pytest.mark.parametrize("accelerator", ["cuda", "cpu"])
def test_fp8_is_planned_in_bf16_where_the_slowest_known_device_has_none(
    accelerator: Literal["cpu", "cuda"],
) -> None:
    config = trained("experiment=h200_8b")
    request = PlanRequest(config, "cuda", 1)
    [(spec, _)] = request.stages(configured_choice(config, ONE_RANK))
    plain = replace(spec, accelerator=accelerator, precision=replace(spec.precision, fp8=None))
    fp8 = replace(plain, precision=replace(spec.precision, fp8="rowwise"))
    assert planned_seconds([fp8], None).step == pytest.approx(
        planned_seconds([plain], None).step, rel=0.2
    )  # the scales are read and written in addition
