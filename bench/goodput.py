"""Goodput with failures: a discrete-event simulation of the restart protocol.

    python -m bench.goodput                       compare with the plan; changes that would help
    python -m bench.goodput record FILE [kills]   record a real run that is killed, for the tests

The simulation has the events of a run (a save falls due, its copy is complete, it is committed, a
failure, a launch has trained its first step, a node is repaired) and shares no formula with
`planning.failures`. Claims: the expected goodput is within 2 points of the simulated one, and the
planned interval loses less than half a point against the best simulated one.
"""

import heapq
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from bench.measurement import write
from cli.arguments import CONF, plan_arguments
from cli.config import load_plan_config
from planning.failures import FailurePlan
from planning.plan import plan_run
from planning.report import failure_plan
from planning.request import configured_choice

ROOT = Path(__file__).parent.parent
DEVICES = (512, 2048, 4096, 8192, 16_384, 24_576)
DEVICES_PER_NODE = 8
INTERVAL = 1000  # steps, as llama3_405b_paper has it
FAILURES = 1000  # of each simulation
BROKEN = 0.78
"""Fraction of failures that are attributed to hardware (arXiv:2407.21783, section 3.3.4)."""
REPAIR_HOURS = 12.0
"""Until a broken node is back; an assumption, not published."""
FACTORS = tuple(2**power for power in (-2, -1, -0.5, 0, 0.5, 1, 2))
"""Intervals that are simulated, relative to the planned best one."""


@dataclass(frozen=True)
class SimulatedJob:
    """Times of a job and its nodes.

    Attributes:
        interval: Steps between saves.
        stall_seconds, write_seconds: Wait of the training for a save, and from there to the commit.
        restart_seconds: From a failure to the end of the next first step.
        mtbf_seconds: Mean time between failures while the job uses all its nodes.
        skip_when_busy: A save is skipped while the previous one is written, instead of delayed.
        spare_nodes: Nodes that replace broken ones; None: any number.
        fewer_nodes: Nodes of the largest smaller mesh that the batch admits, to continue without
            enough nodes; None: the job waits for a repair.
    """

    step_seconds: float
    interval: int
    stall_seconds: float
    write_seconds: float
    restart_seconds: float
    mtbf_seconds: float
    skip_when_busy: bool = False
    n_nodes: int = 1
    spare_nodes: int | None = None
    fewer_nodes: int | None = None
    broken_fraction: float = BROKEN
    repair_seconds: float = REPAIR_HOURS * 3600


@dataclass
class SimulatedTime:
    """Seconds of a simulated run; those of steps are at the speed of all nodes.

    Attributes:
        wall: From the first launch to the last failure.
        productive: Steps that count.
        lost: Steps that were repeated.
        stalled: Waits for saves.
        restart: From each failure to the end of the next first step, and waits for nodes.
        step: Last committed step.
    """

    wall: float = 0.0
    productive: float = 0.0
    lost: float = 0.0
    stalled: float = 0.0
    restart: float = 0.0
    step: int = 0
    lost_steps: int = 0
    failures: int = 0

    @property
    def goodput(self) -> float:
        return self.productive / self.wall


class Simulation:
    """Events of one run in order of time.

    Args:
        launches: Job of each launch and seconds until it fails, as long as all nodes are used;
            None: the same job, and exponential times.
    """

    def __init__(
        self,
        job: SimulatedJob,
        seed: int = 0,
        launches: Iterable[tuple[SimulatedJob, float]] | None = None,
    ) -> None:
        self.job, self.random, self.time = job, random.Random(seed), SimulatedTime()
        failures = random.Random(seed)  # the same for all jobs with equal nodes
        rate = 1 / job.mtbf_seconds
        exponential = ((job, failures.expovariate(rate)) for _ in count())
        self._launches = iter(launches or exponential)
        self._now, self._order = 0.0, count()
        # Time, order of scheduling, launch (None: any), and what happens.
        self._events: list[tuple[float, int, int | None, Callable[[], None]]] = []
        self._launch = self._broken = 0
        self._running_nodes = job.n_nodes  # 0: waits for nodes
        self._step = self._committed = 0
        self._trained = self._committed_trained = 0.0  # seconds of steps up to these
        self._state, self._since = "restart", 0.0
        self._writing = self._waits_to_save = False

    def run(self, failures: int) -> SimulatedTime:
        """Simulate until the given number of failures."""
        self._start()
        while self.time.failures < failures:
            self._now, _, launch, happen = heapq.heappop(self._events)
            if launch in (None, self._launch):  # not of a launch that has ended
                happen()
        self.time.wall, self.time.productive = self._now, self._committed_trained
        self.time.step = self._committed
        return self.time

    def _after(
        self, seconds: float, happen: Callable[[], None], *, any_launch: bool = False
    ) -> None:
        launch = None if any_launch else self._launch
        heapq.heappush(self._events, (self._now + seconds, next(self._order), launch, happen))

    def _enter(self, state: str) -> None:
        """Add the time in the previous state, and enter another one."""
        seconds = self._now - self._since
        if self._state == "step":
            steps = int(seconds / self._step_seconds + 1e-6)
            self._step += steps
            self._trained += seconds * self._running_nodes / self.job.n_nodes
        elif self._state == "stalled":
            self.time.stalled += seconds
        else:
            self.time.restart += seconds
        self._state, self._since = state, self._now

    @property
    def _step_seconds(self) -> float:
        return self.job.step_seconds * self.job.n_nodes / self._running_nodes

    # ------------------------------------------------------------ launches and failures

    def _start(self) -> None:
        """Launch with as many nodes as the job can use, or wait for a repair."""
        job, spare = self.job, self.job.spare_nodes
        healthy = job.n_nodes if spare is None else job.n_nodes + spare - self._broken
        fewer = job.fewer_nodes or 0
        self._running_nodes = job.n_nodes if healthy >= job.n_nodes else fewer
        if self._running_nodes > healthy:
            self._running_nodes = 0
        self._launch += 1
        self._writing = self._waits_to_save = False
        if self._running_nodes:
            self.job, up_time = next(self._launches)
            self._after(self.job.restart_seconds, self._trained_first_step)
            self._after(up_time * job.n_nodes / self._running_nodes, self._fail)

    def _trained_first_step(self) -> None:
        self._enter("step")
        self._step += 1
        self._train_to_next_save()

    def _fail(self) -> None:
        self._enter("restart")
        self.time.failures += 1
        self.time.lost += self._trained - self._committed_trained
        self.time.lost_steps += self._step - self._committed
        self._step, self._trained = self._committed, self._committed_trained
        if self.job.spare_nodes is not None and self.random.random() < self.job.broken_fraction:
            self._broken += 1
            self._after(self.job.repair_seconds, self._repaired, any_launch=True)
        self._start()

    def _repaired(self) -> None:
        """Return a node; a job with fewer nodes saves, stops and restarts with all if it can."""
        self._broken -= 1
        healthy = self.job.n_nodes + (self.job.spare_nodes or 0) - self._broken
        if self._running_nodes == self.job.n_nodes or healthy < (
            self.job.n_nodes if self._running_nodes else self.job.fewer_nodes or self.job.n_nodes
        ):
            return
        if self._running_nodes and self._state == "step":
            self._enter("restart")
            self._committed, self._committed_trained = self._step, self._trained
            self._launch += 1  # nothing else happens to this one
            self._after(self.job.stall_seconds + self.job.write_seconds, self._start)
        elif not self._running_nodes:
            self._start()

    # ------------------------------------------------------------ steps and saves

    def _train_to_next_save(self) -> None:
        steps = self.job.interval - self._step % self.job.interval
        self._after(steps * self._step_seconds, self._save_is_due)

    def _save_is_due(self) -> None:
        self._enter("stalled")
        if not self._writing:
            self._copy()
        elif self.job.skip_when_busy:
            self._enter("step")
            self._train_to_next_save()
        else:
            self._waits_to_save = True

    def _copy(self) -> None:
        self._after(self.job.stall_seconds, self._copied)

    def _copied(self) -> None:
        step, trained = self._step, self._trained
        self._writing = True
        self._after(self.job.write_seconds, lambda: self._commit(step, trained))
        self._enter("step")
        self._train_to_next_save()

    def _commit(self, step: int, trained: float) -> None:
        self._committed, self._committed_trained, self._writing = step, trained, False
        if self._waits_to_save:
            self._waits_to_save = False
            self._copy()


# ---------------------------------------------------------------- comparison with the plan


def planned(devices: int) -> FailurePlan:
    """Return the failure plan of Llama 3 405B with batches of 16M tokens and tp=8."""
    words = ["experiment=llama3_405b_paper", "tokenizer=byte", "data.stages=[]", "parallel.tp=8"]
    batch = 3072 if devices % 3 == 0 else 2048
    words += ["train.seq_len=8192", f"train.global_batch_size={batch}"]
    words += [f"devices={devices}", f"checkpoint.interval={INTERVAL}"]
    config = load_plan_config(compose("plan", plan_arguments(words)))
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.device)
    return failure_plan(config, run)


def simulated_job(plan: FailurePlan, interval: int) -> SimulatedJob:
    """Return the job that a plan of one stage describes, with another interval."""
    [(step_seconds, _)] = plan.stages
    times = asdict(plan.interruptions)
    return SimulatedJob(step_seconds, interval, n_nodes=plan.n_nodes, **times)


def compare(plan: FailurePlan, failures: int = FAILURES) -> dict[str, Any]:
    """Compare expected and simulated goodput at two intervals, and the best intervals."""
    best, rows = plan.best_interval, dict[int, dict[str, float]]()
    [(step_seconds, _)] = plan.stages
    for interval, times in ((plan.config.interval or best, 4), (best, 1)):
        expected = plan.interruptions.expected(interval * step_seconds).productive
        found = Simulation(simulated_job(plan, interval)).run(times * failures).goodput
        rows[interval] = {"expected": expected, "simulated": found, "error": expected - found}
    goodputs = {
        interval: Simulation(simulated_job(plan, interval)).run(failures).goodput
        for interval in {max(1, round(best * factor)) for factor in FACTORS}
    }
    best_simulated = max(goodputs, key=lambda interval: goodputs[interval])
    return {
        "mtbf_hours": plan.interruptions.mtbf_seconds / 3600,
        "intervals": rows,
        "best_interval": best,
        "best_simulated_interval": best_simulated,
        "loss_of_planned_interval": goodputs[best_simulated] - goodputs[best],
    }


def improvements(plan: FailurePlan, failures: int = FAILURES) -> dict[str, float]:
    """Return the simulated goodput after each change of a job without spare nodes.

    Nodes that break are repaired after `REPAIR_HOURS`. The largest smaller mesh for a batch of a
    power of two has half the nodes.
    """
    base = replace(simulated_job(plan, plan.config.interval or 1), spare_nodes=0)
    best = replace(base, interval=plan.best_interval)
    jobs = {
        "as configured": base,
        "best interval": best,
        "half the restart time": replace(base, restart_seconds=base.restart_seconds / 2),
        "one spare node": replace(base, spare_nodes=1),
        "spare nodes, 1 of 64": replace(base, spare_nodes=-(-base.n_nodes // 64)),
        "half the nodes until the repair": replace(base, fewer_nodes=base.n_nodes // 2),
        "best interval, half the nodes": replace(best, fewer_nodes=base.n_nodes // 2),
        "best interval, spare nodes": replace(best, spare_nodes=-(-base.n_nodes // 64)),
        "both, half the restart time": replace(
            best, spare_nodes=-(-base.n_nodes // 64), restart_seconds=base.restart_seconds / 2
        ),
    }
    return {name: Simulation(job).run(failures).goodput for name, job in jobs.items()}


# ---------------------------------------------------------------- a real run that is killed

RECORDED = (
    *("model=llama3_tiny", "model.dim=64", "model.n_layers=2", "train.global_batch_size=4"),
    *("train.seq_len=128", "train.max_steps=100000", "validation.interval=null", "data=mock"),
    *("checkpoint.interval=10", "log.interval=1", "parallel.accelerator=cpu"),
    *("log.tensorboard=false", "run.plan_check=off"),
)
RUNNING_SECONDS = 10.0  # longest time from the start of training to a kill


def record(path: Path, kills: int) -> None:
    """Kill a run at random times, and write the measured times of each launch and its goodput.

    The goodput knows the lost steps that were logged, hence `log.interval=1`.
    """
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *RECORDED, f"run.dir={folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ledger = Path(folder) / "run" / "ledger.jsonl"
        ends: list[tuple[float, float]] = []
        for number in range(kills + 1):
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
            )
            started = time.time()
            while number % 4 != 1 and not has_trained(ledger, started):  # others: during set-up
                time.sleep(0.01)
            time.sleep(generator.uniform(0, RUNNING_SECONDS / (5 if number % 4 == 1 else 1)))
            if number < kills:
                process.kill()
            else:
                process.terminate()
            ends.append((started, time.time()))
            process.wait()
        events = [json.loads(line) for line in ledger.read_text().splitlines()]
    values = {"interval": 10, **recorded_times(events, ends)}
    path.write_text(json.dumps(values, indent=1) + "\n")


def has_trained(ledger: Path, started: float) -> bool:
    """Return whether the launch of this time has trained a step."""
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return any(each["event"] == "trained" and _seconds(each) > started for each in events)


def recorded_times(
    events: list[Mapping[str, Any]], ends: list[tuple[float, float]]
) -> dict[str, Any]:
    """Return the times of each launch, from the event log and the times of the kills.

    Args:
        ends: When each process was started and killed.
    """
    launches = []
    for started, ended in ends:
        own = [each for each in events if started <= _seconds(each) <= ended + 1]
        trained = [each for each in own if each["event"] == "trained"]
        points = [each for each in own if "productive_seconds" in each]
        saves = [each for each in own if each["event"] == "save"]
        elapsed, stalled, steps = (
            points[-1][key] - points[0][key] if points else 0
            for key in ("elapsed_seconds", "stalled_seconds", "step")
        )
        launches.append(
            {
                "up_seconds": ended - started,
                "restart_seconds": _seconds(trained[0]) - started if trained else None,
                "step_seconds": (elapsed - stalled) / steps if steps else None,
                "stall_seconds": [each["seconds"] for each in saves],
                "write_seconds": [each["write_seconds"] for each in saves],
            }
        )
    starts = [each["step"] for each in events if each["event"] == "start"]
    return {"launches": launches, "last_start": starts[-1], "goodput": events[-1]["goodput"]}


def _seconds(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def replay(recorded: Mapping[str, Any]) -> SimulatedTime:
    """Simulate a recorded run with its measured times, up to its last kill.

    A launch without a value of its own, because it was killed early, has the median of the others.
    """
    *killed, _ = recorded["launches"]

    def median(name: str, launch: Mapping[str, Any]) -> float:
        values = launch[name] if isinstance(launch[name], list) else [launch[name]]
        known = [each for each in values if each is not None]
        if known:
            return statistics.median(known)
        others = [each[name] for each in killed]
        flat = [value for each in others for value in (each if isinstance(each, list) else [each])]
        return statistics.median(value for value in flat if value is not None)

    launches = [
        (
            SimulatedJob(
                step_seconds=median("step_seconds", launch),
                interval=recorded["interval"],
                stall_seconds=median("stall_seconds", launch),
                write_seconds=median("write_seconds", launch),
                restart_seconds=launch["restart_seconds"] or launch["up_seconds"] + 1,
                mtbf_seconds=1.0,
            ),
            launch["up_seconds"],
        )
        for launch in killed
    ]
    # The launch after the last kill does not fail.
    return Simulation(launches[0][0], launches=[*launches, (launches[0][0], 1e9)]).run(len(killed))


def main() -> None:
    """Run the benchmark and write `bench/results/goodput.json`."""
    if sys.argv[1:2] == ["record"]:
        record(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 10)
        return
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plans = {devices: planned(devices) for devices in DEVICES}
    results = {str(devices): compare(plan) for devices, plan in plans.items()}
    changes = {str(devices): improvements(plan) for devices, plan in plans.items()}
    for name in next(iter(changes.values())):
        print(f"{name:<32}", *(f"{each[name]:>8.1%}" for each in changes.values()))
    write(Path(__file__).stem, {"comparison": results, "improvements": changes})
    rows = [row for each in results.values() for row in each["intervals"].values()]
    assert max(abs(row["error"]) for row in rows) < 0.02
    assert max(each["loss_of_planned_interval"] for each in results.values()) < 0.005


if __name__ == "__main__":
    main()
