"""A complete run of train.py on a fake GPU: steps, validation, text, saves, and a second launch.

One process, as with `python train.py parallel.devices=1`. Collectives of the CPU are real (gloo).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_device import on_fake_device
from hydra import compose, initialize_config_dir

from cli.arguments import CONF, hydra_arguments

STEPS = 4


def train_twice(overrides: list[str]) -> dict[str, Any]:
    """Train to the end, launch again, and return what the device was asked for."""
    import cuda_stubs
    import torch
    import torch.distributed as dist

    import train
    from cli.config import check_config
    from training.preflight import prepare_data
    from training.resume_policy import Changes

    start = dist.init_process_group
    found: dict[str, Any] = {}

    def init_process_group(backend: str, **kwargs: Any) -> None:
        assert backend == "nccl"
        kwargs.pop("device_id", None)
        start("cpu:gloo,cuda:fake", **kwargs)

    def validate(run: Any) -> float:
        cuda_stubs.host_value = 1  # zero targets would be an error
        loss = real_validate(run)
        cuda_stubs.host_value = 0
        return loss

    setattr(dist, "init_process_group", init_process_group)  # noqa: B010
    real_validate, train.validate = train.validate, validate
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", hydra_arguments(overrides, "train"))
    for launch in ("first", "second"):
        config, processes, mesh = check_config(composed)
        assert processes.accelerator == "cuda"
        run = train.set_up(config, processes, mesh, prepare_data(config), Changes())
        found[f"{launch} starts at"] = run.position.step
        train.train(run)
        run.watchdog.close()
        dist.destroy_process_group()
        assert {p.device for p in run.model.parameters()} == {torch.device("cuda", 0)}
    found["threads that wait"] = sorted({call.thread for call in cuda_stubs.waits()})
    return found


@pytest.fixture(scope="module")
def run(
    data_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fake_gpu") / "run"
    overrides = [
        *("experiment=smoke", *data_overrides, f"run.dir={folder}", "parallel.accelerator=cuda"),
        *(f"train.max_steps={STEPS}", "checkpoint.interval=2", "validation.interval=2"),
        *("validation.sample_tokens=3", "log.tensorboard=false", "log.interval=1"),
        *("parallel.compile=false", "parallel.devices=1", "precision.optimizer_state=bf16"),
    ]
    return folder, on_fake_device(train_twice, overrides, gpus=1)


def test_run_trains_validates_and_writes_text_and_checkpoints(run: Any) -> None:
    folder, _ = run
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 4]
    assert (folder / "samples.txt").read_text()
    saved = sorted(path.parent.name for path in (folder / "checkpoints").glob("*/COMMITTED"))
    assert saved == ["step-00000002", "step-00000004"]


def test_second_launch_restores_the_checkpoint_onto_the_device(run: Any) -> None:
    _, found = run
    assert (found["first starts at"], found["second starts at"]) == (0, STEPS)


def test_no_thread_but_the_main_one_waits_for_the_device(run: Any) -> None:
    """A thread that has not called set_device would have raised."""
    _, found = run
    assert found["threads that wait"] == ["MainThread"]
