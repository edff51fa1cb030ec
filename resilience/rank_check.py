"""Compare the devices of the ranks of a run before they create process groups.

A group waits for missing ranks until its timeout, and fails in NCCL or in a collective if ranks
disagree. Therefore each launched process first writes its device to the key-value store of the
rendezvous, or its error if it cannot start; rank 0 compares them and publishes the result. A run
that starts its own processes needs no comparison: they are on one machine, which was validated.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from queue import Empty, Queue
from typing import Any

from parallel.config import BF16_CAPABILITY
from resilience.errors import LaunchError
from resilience.gpu_probe import own_gpu, visible_devices
from resilience.processes import Processes, launched_processes, process_ranks
from resilience.rank_groups import name_ranks, without_rank
from resilience.slurm import host_name, rendezvous
from resilience.watchdog import Watchdog

FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.002, 0.25
CHECK_SECONDS = 1800.0  # for all ranks to arrive, if the watchdog has no limit for the set-up
HANDSHAKE_SECONDS = 60.0  # for the store to answer
REPORT_SECONDS = 60.0  # for rank 0 to read the error of another rank
COLLECT_SECONDS = 2.0  # for more errors after the first one
ANSWER_SECONDS = 10.0  # for other ranks to read the error of rank 0


@dataclass(frozen=True)
class RankReport:
    """What one rank sees.

    Attributes:
        device: Name and memory of its GPU, or `cpu`.
        uuid: Of its GPU or MIG slice; empty without one.
        bus: PCI address of its GPU, which the slices of a GPU share; empty if unknown.
        has_bf16: Whether its GPU has bf16 tensor cores; None without a GPU.
        choice: What `parallel.auto` has chosen, as settings; empty without it.
        error: Why it cannot start; empty if it can.
        order: Its position among the ranks that cannot start: 1 for the first to fail.
    """

    rank: int
    host: str
    device: str = ""
    uuid: str = ""
    bus: str = ""
    has_bf16: bool | None = None
    torch: str = ""
    choice: str = ""
    error: str = ""
    order: int = 0


def check_ranks(processes: Processes, watchdog: Watchdog, choice: str = "") -> Any:
    """Compare the devices of all ranks; return the store, to be kept until the group exists.

    Prints warnings about differences on rank 0. The watchdog aborts if ranks are missing at the end
    of its limit for the set-up, and names them.

    Args:
        choice: Settings that each rank has chosen for itself, which must be equal.

    Raises:
        LaunchError: Names the ranks that cannot start or do not match the others.
    """
    timeout = min(watchdog.limits.setup, CHECK_SECONDS)
    store, own = open_store(timeout), replace(own_report(processes), choice=choice)
    store.set(f"report/{own.rank}", json.dumps(asdict(own)))
    store.add("arrived", 1)
    if own.rank == 0:
        default = watchdog.setup_hint
        watchdog.setup_hint = lambda: "\n".join(_collect(store, processes.world_size)[0])
        errors, warnings = _wait_for_reports(store, processes.world_size, timeout)
        watchdog.setup_hint = default
        for warning in warnings:
            print(f"Warning: {warning}", flush=True)
        store.set("errors", json.dumps(errors))
        if errors:  # the store exits with this process
            with suppress(TimeoutError):
                others = store.add("arrived", 0) - 1
                _wait(lambda: store.add("read", 0) >= others, ANSWER_SECONDS)
    else:
        _wait(lambda: store.check(["errors"]), timeout)
        errors = json.loads(store.get("errors"))
        store.add("read", 1)
    if errors:
        raise LaunchError("\n  - ".join(["not all processes can start:", *errors]))
    return store


def own_report(processes: Processes) -> RankReport:
    """Return the report of this process."""
    import torch

    report = RankReport(process_ranks()[0], host_name(), "cpu", torch=torch.__version__)
    if processes.accelerator != "cuda":
        return report
    _, gpu = own_gpu()
    # A process sees one slice only, by its own UUID; the properties may have that of the GPU.
    slices = [each for each in visible_devices(os.environ) if each.startswith("MIG-")]
    return replace(
        report,
        device=str(gpu),
        uuid=slices[0] if slices else gpu.uuid,
        bus=gpu.bus or "",
        has_bf16=gpu.capability >= BF16_CAPABILITY,
    )


def report_error(message: str) -> bool:
    """Report an error of this process, before the group exists, to the other ranks.

    Rank 0 calls it after printing its error, so that the others do not wait for it.

    Returns:
        Whether the error is known on rank 0, which prints it.
    """
    started = launched_processes(os.environ)
    if started is None or started.world_size == 1:
        return True
    if started.launcher == "srun":
        os.environ.update(rendezvous(os.environ))
    rank, deadline = process_ranks()[0], time.monotonic() + REPORT_SECONDS
    with suppress(Exception):  # rank 0 may have exited, or another program may use the port
        if rank == 0:
            store, others = open_store(ANSWER_SECONDS), started.world_size - 1
            store.set("errors", json.dumps([message]))
            _wait(lambda: store.add("read", 0) >= others, ANSWER_SECONDS)
            return True
        store = open_store(REPORT_SECONDS)
        order = store.add("order", 1)
        report = RankReport(rank, host_name(), error=message, order=order)
        store.set(f"report/{rank}", json.dumps(asdict(report)))
        store.add("failed", 1)
        store.add("arrived", 1)
        with suppress(RuntimeError):  # rank 0 has exited with an error of its own
            _wait(lambda: store.check(["errors"]), deadline - time.monotonic())
            store.add("read", 1)
        return True
    return rank == 0  # which has printed its error


def open_store(timeout: float) -> Any:
    """Return a store at the address of the rendezvous, once rank 0 or torchrun serves it.

    The process group then shares rank 0's server (torch/distributed/rendezvous.py,
    `_create_c10d_store`: `multi_tenant`).

    Raises:
        DistNetworkError, TimeoutError: The port is in use, or nothing answers within `timeout`.
    """
    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = process_ranks()[0] == 0 and not served_by_agent
    limit, shared = timedelta(seconds=timeout), not served_by_agent

    def connect(host: str) -> Any:
        return TCPStore(
            host, port, None, is_server, limit, wait_for_workers=False, multi_tenant=shared
        )

    # TCPStore would print a trace for each failed attempt, also on rank 0 if the address of
    # another machine is set.
    server = connect("localhost") if is_server else None
    _wait(lambda: _accepts_connections(host, port), timeout)
    store = _call_within(HANDSHAKE_SECONDS, partial(connect, host))
    del server  # the store shares it
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"llamesh/{attempt}", store)


def _call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """Return the result of a call that has no time limit of its own.

    TCPStore waits for the answer of whatever accepts its connection.

    Raises:
        TimeoutError: The call takes longer; it continues in a daemon thread.
    """
    results: Queue[tuple[Any, BaseException | None]] = Queue()

    def call() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=call, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except Empty:
        raise TimeoutError("what accepts connections there is not this run's store") from None
    if error is not None:
        raise error
    return result


def compare(reports: Mapping[int, RankReport], size: int) -> tuple[list[str], list[str]]:
    """Return the errors and warnings that follow from the reports that have arrived."""
    values = list(reports.values())
    by_error: dict[str, list[RankReport]] = {}
    for each in sorted(values, key=lambda report: report.order):
        by_error.setdefault(without_rank(each.error, each.host), []).append(each)
    failed = [
        f"{_name(group)}: {_shown_error(group)}" for cause, group in by_error.items() if cause
    ]
    missing = [rank for rank in range(size) if rank not in reports]
    if failed:
        return failed, []
    if missing:
        hosts = ", ".join(dict.fromkeys(each.host for each in values))
        return [
            f"{name_ranks(missing)} of {size} did not start ({hosts} did); check that the launcher "
            "reached every node, and that all nodes reach MASTER_ADDR:MASTER_PORT"
        ], []
    errors = []
    if len({each.has_bf16 for each in values}) > 1:
        errors.append(
            f"ranks have different kinds of devices: {_groups(values, _kind)}; repair or exclude "
            "the nodes (sbatch --exclude), or use nodes of one kind"
        )
    if len({each.choice for each in values}) > 1:
        groups = _groups(values, lambda report: report.choice)
        errors.append(
            f"parallel.auto=true has chosen differently on ranks with other devices or memory: "
            f"{groups}; give these keys on the command line, or use nodes of one kind"
        )
    by_gpu: dict[str, list[RankReport]] = {}
    for each in values:
        by_gpu.setdefault(each.uuid, []).append(each)
    for uuid, sharing in by_gpu.items():
        if uuid and len(sharing) > 1:
            errors.append(
                f"{_name(sharing)} use the same GPU ({sharing[0].device}, UUID {uuid}); start one "
                "process per GPU, with SLURM as many tasks as GPUs per node "
                "(--ntasks-per-node, --gpus-per-node) and no --gpu-bind"
            )
    if errors:
        return errors, []
    warnings = []
    by_bus: dict[tuple[str, str], list[RankReport]] = {}
    for each in values:
        by_bus.setdefault((each.host, each.bus), []).append(each)
    for (_, bus), sharing in by_bus.items():
        if bus and len(sharing) > 1:
            warnings.append(
                f"{_name(sharing)} use MIG slices of one GPU ({bus}), which NCCL before 2.30 "
                "rejects as a duplicate GPU; use slices of different GPUs, or one process on the "
                "GPU without MIG (nvidia-smi -mig 0)"
            )
    if len({(each.device, each.torch) for each in values}) > 1:
        warnings.append(
            f"ranks differ: {_groups(values, _details)}; the slowest sets the step time"
        )
    return errors, warnings


def _wait_for_reports(store: Any, size: int, timeout: float) -> tuple[list[str], list[str]]:
    """Return errors and warnings on rank 0, once all ranks have arrived or one has failed."""
    with suppress(TimeoutError):
        _wait(lambda: store.add("arrived", 0) >= size or store.add("failed", 0) > 0, timeout)
    if store.add("failed", 0):
        with suppress(TimeoutError):
            _wait(lambda: store.add("arrived", 0) >= size, COLLECT_SECONDS)
    return _collect(store, size)


def _collect(store: Any, size: int) -> tuple[list[str], list[str]]:
    """Return the errors and warnings that follow from the reports in the store."""
    keys = {rank: f"report/{rank}" for rank in range(size)}
    found = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
    return compare({rank: RankReport(**json.loads(text)) for rank, text in found.items()}, size)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    """Poll until the condition holds; signals are handled in between, unlike in the store's wait.

    Raises:
        TimeoutError: It does not hold within `seconds`.
    """
    deadline, pause = time.monotonic() + seconds, FIRST_POLL_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        time.sleep(pause)
        pause = min(1.5 * pause, LAST_POLL_SECONDS)


def _accepts_connections(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2.0).close()
    except OSError:
        return False
    return True


def _kind(report: RankReport) -> str:
    return report.device if report.has_bf16 is not None else "no GPU (cpu)"


def _details(report: RankReport) -> str:
    return f"{report.device}, torch {report.torch}"


def _groups(reports: Iterable[RankReport], key: Callable[[RankReport], str]) -> str:
    """Return the ranks with each value of `key`, smallest groups first."""
    groups: dict[str, list[RankReport]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    return "; ".join(f"{_name(group)}: {value}" for value, group in ordered)


def _shown_error(reports: Sequence[RankReport]) -> str:
    """Return the error of the first rank to fail, with its rank if the errors of ranks differ."""
    first = reports[0]
    differ = any(each.error != first.error for each in reports)
    return first.error + (f" (on rank {first.rank})" if differ else "")


def _name(reports: list[RankReport]) -> str:
    """Return `rank 5 on node-3`, or `ranks 0-7 on node-1, node-2`."""
    hosts = list(dict.fromkeys(report.host for report in reports))
    shown = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more hosts" if len(hosts) > 4 else "")
    return f"{name_ranks([report.rank for report in reports])} on {shown}"
