"""The training loop around a device that works for longer than the host takes to queue its work.

The loop, clock, statistics reader, loss monitor and logs are the real ones; steps, validation and
saves take the time that a test gives them on the virtual device.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from virtual_device import VirtualDevice, VirtualPool, virtual_device

import train
from checkpoint.host_copy import DeferredTensor, copy_to_host
from checkpoint.position import Position
from cli.arguments import CONF, hydra_arguments
from cli.config import check_config
from data.loader import Loader
from parallel.step_scalars import NO_REQUESTS, StepRequests
from resilience.exit_codes import ExitCode
from resilience.goodput import compute_goodput
from resilience.loss_monitor import AsyncStatsReader, LossMonitor
from resilience.signals import Requests
from training import recovery
from training.console import Console
from training.resume_policy import Changes
from training.run import Run

HOST, STEP = 0.015, 0.2  # seconds to queue a step, and to execute it on the device
VALIDATION, SAVE = 1.5, 0.5
SILENT = (
    *("data=stdlib", "tokenizer=byte", "parallel.accelerator=cpu", "log.tensorboard=false"),
    *("checkpoint.interval=null", "validation.interval=null", "log.interval=10"),
)


class Loop:
    """A run whose steps take `step_seconds` of a virtual device.

    Attributes:
        losses: Loss of a step, if not its number.
        made: Requests of a step, by number.
        checked: Step and loss of each `StepStats` that the loss monitor has received.
    """

    def __init__(self, device: VirtualDevice, folder: Path, *overrides: str) -> None:
        self.device, self.folder = device, folder
        words = ["experiment=smoke", *SILENT, f"run.dir={folder}", *overrides]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config, processes, mesh = check_config(
                compose("train", hydra_arguments(words, "train"))
            )
        self.losses: dict[int, float] = {}
        self.made: dict[int, StepRequests] = {}
        self.checked: list[tuple[int, float]] = []
        self.read_seconds, self.threads = 0.0, 1
        fabric: Any = SimpleNamespace(
            device=torch.device("cuda"), is_global_zero=True, global_rank=0
        )
        nothing = SimpleNamespace(
            enter=lambda *_: None, during=lambda *_: nullcontext(), limits="", has_saved=False
        )
        self.run = Run(
            config=config,
            processes=processes,
            mesh=mesh,
            fabric=fabric,
            strategy=SimpleNamespace(pipeline=None),  # type: ignore[arg-type]
            model=SimpleNamespace(module=None),
            optimizer=SimpleNamespace(optimizer=None),
            dataset=SimpleNamespace(hash="data"),  # type: ignore[arg-type]
            position=Position(step=0, samples=0, tokens=0, data_hash="data"),
            console=Console(enabled=False),
            stages=config.stages(),
            requests=Requests(),
            watchdog=nothing,  # type: ignore[arg-type]
            saver=SimpleNamespace(save=self.save, poll=list, finish=lambda: None),  # type: ignore[arg-type]
            reader=AsyncStatsReader("cuda"),
            monitor=LossMonitor(config.faults),
        )
        self.run.batches = self.batches  # type: ignore[assignment, method-assign]
        check = self.run.monitor.check

        def watched(stats: Any) -> Any:
            self.checked.append((stats.step, stats.loss))
            return check(stats)

        self.run.monitor.check = watched  # type: ignore[method-assign]

    def batches(self) -> Iterator[Any]:
        loader = Loader(rank=0, size=1, prefetch=2)
        position = self.run.position

        def read(number: int) -> Any:
            return SimpleNamespace(number=number, stream_positions=None)

        return loader.read_ahead(read, self.threads, position.batches, position.skips)

    def step(self, run: Any, batch: Any, lr: float, requests: Any) -> dict[str, Any]:
        """Replaces `train_step`: queue the work and return tensors on the device."""
        self.device.advance(HOST)
        self.device.launch(STEP)
        number = run.position.step + 1
        made = dataclasses.astuple(self.made.get(number, NO_REQUESTS))
        scalars = self.device.tensor([self.losses.get(batch.number, float(number)), 1.0, *made])
        return {"scalars": scalars, "batch_hash": self.device.tensor([1])}

    def validate(self, run: Any) -> float:
        assert self.device.current.end <= self.device.now, "the step still runs"
        self.device.launch(VALIDATION)
        self.device.current.synchronize()
        return 1.0

    def save(self, *_: Any) -> None:
        assert self.device.current.end <= self.device.now, "the step still runs"
        self.device.advance(SAVE)

    def train(self) -> list[dict[str, Any]]:
        """Run the loop to its end and return the lines of `metrics.jsonl`."""
        self.run.open_logs(Changes())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", self.step)
            patch.setattr(train, "validate", self.validate)
            patch.setattr(train, "write_sample", lambda run: None)
            patch.setattr(Run, "draw", lambda run: None)
            patch.setattr(
                "data.loader.ThreadPoolExecutor",
                lambda workers, **_: VirtualPool(self.device, self.read_seconds, workers),
            )
            train.train(self.run)
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "ledger.jsonl").open()]


@pytest.fixture
def device() -> Iterator[VirtualDevice]:
    with virtual_device() as device:
        yield device


def test_throughput_of_each_logged_interval_is_that_of_the_device(
    device: VirtualDevice, tmp_path: Path
) -> None:
    overrides = ("train.max_steps=35", "validation.interval=15", "checkpoint.interval=12")
    loop = Loop(device, tmp_path, *overrides)
    start = device.now
    records = loop.train()
    # After a log, a validation or a save, the device is idle while the host queues one step.
    idle = {1: 1, 10: 1, 15: 2, 20: 1, 30: 2, 35: 1}  # step: such steps since the previous log
    assert [record["step"] for record in records] == list(idle)
    previous = 0
    for record in records:
        steps = record["step"] - previous
        seconds = STEP + HOST * idle[record["step"]] / steps
        assert record["step_seconds"] == pytest.approx(seconds)
        assert record["tokens_per_second"] == pytest.approx(8 * 64 / seconds)
        assert record["data_wait_seconds"] == 0
        assert record["loss"] == previous + steps
        previous = record["step"]
    spent = loop.run.clock.spent()
    assert spent["productive_seconds"] == pytest.approx(35 * STEP + sum(idle.values()) * HOST)
    assert spent["stalled_seconds"] == pytest.approx(3 * VALIDATION + 3 * SAVE)
    assert spent["elapsed_seconds"] == pytest.approx(device.now - start, abs=0.1)


def test_each_sequence_length_has_its_own_throughput(device: VirtualDevice, tmp_path: Path) -> None:
    stages = "data.stages=[{from_sample: 64, seq_len: 32}]"
    records = Loop(device, tmp_path, "train.max_steps=20", "log.interval=100", stages).train()
    assert [record["step"] for record in records] == [1, 8, 20]
    for record, steps, seq_len in zip(records, (1, 7, 12), (64, 64, 32), strict=True):
        seconds = STEP + HOST / steps
        assert record["tokens_per_second"] == pytest.approx(8 * seq_len / seconds)


def test_steps_that_neither_log_nor_save_do_not_wait_for_themselves(
    device: VirtualDevice, tmp_path: Path
) -> None:
    loop = Loop(device, tmp_path, "train.max_steps=5", "log.interval=100")
    waits: list[float] = []
    step = loop.step

    def timed(*arguments: Any) -> Any:
        waits.append(device.current.end - device.now)
        return step(*arguments)

    loop.step = timed  # type: ignore[assignment, method-assign]
    loop.train()
    # The host queues step n+1 while the device executes step n; the first one is waited for.
    assert waits[1] <= 0 and all(wait > 0 for wait in waits[2:])


@pytest.mark.parametrize(
    ("read_seconds", "threads", "step_seconds", "exposed"),
    [
        (0.15, 1, STEP, 0.0),  # read while the device works
        (0.3, 2, STEP, 0.0),
        (0.3, 1, 0.3, 0.1),
    ],
)
def test_data_wait_is_the_time_that_the_device_has_no_work(
    device: VirtualDevice,
    tmp_path: Path,
    read_seconds: float,
    threads: int,
    step_seconds: float,
    exposed: float,
) -> None:
    loop = Loop(device, tmp_path, "train.max_steps=30")
    loop.read_seconds, loop.threads = read_seconds, threads
    last = loop.train()[-1]
    # The first step after a log waits for the host, too.
    assert last["step_seconds"] == pytest.approx(step_seconds, abs=2 * HOST / 10)
    assert last["data_wait_seconds"] == pytest.approx(exposed, abs=2 * HOST)


def test_statistics_read_one_step_late_belong_to_their_step(
    device: VirtualDevice, tmp_path: Path
) -> None:
    loop = Loop(device, tmp_path, "train.max_steps=25", "checkpoint.interval=7")
    loop.train()
    assert loop.checked == [(step, float(step)) for step in range(1, 26)]


def test_requests_take_effect_one_step_late_after_all_steps_were_checked(
    device: VirtualDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(device, tmp_path, "train.max_steps=25")
    loop.made[4] = StepRequests(stopped=1)
    stopped: list[Any] = []

    def stop(run: Any, code: ExitCode, reason: str) -> None:
        stopped.append((run.position.step, code, loop.checked[-1][0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "stop_run", stop)
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    assert stopped == [(5, ExitCode.STOPPED, 5)]
    # Step 1 was waited for, so steps 2 and 6 start on an idle device.
    assert loop.run.clock.spent()["productive_seconds"] == pytest.approx(5 * STEP + 2 * HOST)


def test_rewound_steps_are_lost_time(
    device: VirtualDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("train.max_steps=12", "faults.max_consecutive_skips=1", "log.interval=4")
    loop = Loop(device, tmp_path, *overrides)
    loop.losses[5] = float("nan")  # of step 6, known when step 7 has been queued

    def restore(config: Any, *_: Any) -> Position:
        assert device.current.end <= device.now, "step 7 still runs"
        return Position(step=4, samples=32, tokens=4 * 512, data_hash="data", batches=4)

    monkeypatch.setattr(recovery, "_load_or_initialize", restore)
    monkeypatch.setattr(recovery, "_record_rewind", lambda *_: None)
    records = loop.train()
    assert [record["step"] for record in records] == [1, 4, 8, 12]
    (rewound,) = [event for event in loop.events() if event["event"] == "rewound"]
    assert (rewound["step"], rewound["to"]) == (7, 4)
    assert rewound["productive_seconds"] == pytest.approx(7 * STEP + 3 * HOST)
    goodput = compute_goodput(loop.events())
    # The event of step 2 has the time up to the end of step 1.
    assert goodput.lost_steps == 3 and goodput.lost == pytest.approx(3 * STEP, rel=0.25)
    # Throughput counts the steps that were executed.
    assert records[2]["step_seconds"] == pytest.approx(STEP + 2 * HOST / 7)


def test_copy_for_a_save_is_complete_on_return_and_waits_once(device: VirtualDevice) -> None:
    """The writer thread reads the buffers at once, and the next save reuses them."""
    buffers = None
    for save in (1.0, 2.0):
        device.launch(STEP)
        weights = [device.tensor([save * index, save]) for index in range(3)]
        moment = DeferredTensor(weights[0], partial(device.tensor, [save, -save]))
        device.waits.clear()
        copied = copy_to_host({"weights": weights, "moment": moment, "step": save}, buffers)
        assert device.waits == ["Stream.synchronize"]
        assert [each.tolist() for each in copied["weights"]] == [
            [save * index, save] for index in range(3)
        ]
        assert copied["moment"].tolist() == [save, -save] and copied["step"] == save
        assert buffers is None or copied["weights"][0] is buffers["weights"][0]
        buffers = copied


def test_profiled_step_and_the_one_before_it_are_measured_completely(
    device: VirtualDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profiler synchronizes before and after the step."""
    loop = Loop(device, tmp_path, "train.max_steps=12", "log.interval=12", "log.profile=[6]")
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda _: device.wait_until(device.current.end, "synchronize")
    )
    profiler = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr("training.profile.profile", lambda **_: profiler)
    monkeypatch.setattr("torch.cuda.memory._record_memory_history", lambda **_: None)
    monkeypatch.setattr("torch.cuda.memory._snapshot", dict)
    last = loop.train()[-1]
    idle = 3  # after the first step, before and after the profiled one
    assert device.waits.count("synchronize") == 2
    assert last["step_seconds"] == pytest.approx(STEP + idle * HOST / 11)
