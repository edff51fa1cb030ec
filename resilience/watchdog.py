"""The watchdog: a dead or hung rank aborts the run within a time limit.

Every rank writes heartbeats (phase, step, stack of the main thread) to a key-value store hosted by
rank 0. Rank 0 checks them, publishes the reason to abort, and every process exits by itself
and kills the processes it started, because a rank blocked in a collective cannot be reached
otherwise. The last position of a rank that
was killed, suspended or lost with its node is therefore still known. Exits do not depend on a file
system: reports are written by another thread, within a time limit.
"""

import faulthandler
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from subprocess import Popen
from typing import Any, NoReturn

from resilience import flight_recorder
from resilience.blocked_threads import blocked_threads, describe
from resilience.config import TimeLimits
from resilience.exit_codes import ExitCode
from resilience.exit_timer import ExitTimer, run_limited
from resilience.heartbeat import (
    Heartbeat,
    Phase,
    group_by_stack,
    hosts_at_fault,
    stack_of,
    stage_waits,
)
from resilience.processes import process_ranks
from resilience.rank_groups import without_rank
from resilience.slurm import host_name

HEARTBEAT_SECONDS = 1.0
RANKS_PER_HEARTBEAT = 256  # above this many ranks the interval grows: rank 0 reads every heartbeat
SILENT_SECONDS = 60.0  # a process without a heartbeat for this long counts as dead
GRACE_SECONDS = 5.0  # for processes to exit by themselves when all exit together
PAUSE_SECONDS = 5.0  # a longer gap in both threads means that the process was suspended
BACKSTOP_SECONDS = 8.0  # beyond a limit, for a process whose Python threads no longer run
ABORT_SECONDS = 8.0  # for an abort, of which
REPORT_SECONDS = 5.0  # for messages, event log and flight recorder, whose disk may hang, and
KILL_SECONDS = 1.5  # for killed children to exit
CLOSE_SECONDS = 60.0  # at most, for the end of an exit, such as Python's finalization
NEAR_LIMIT_SECONDS = 5.0  # before a limit, heartbeats include the threads that wait for files

PEER_FAILURES = (ExitCode.RANK_FAILED, ExitCode.RANK_FAILED_BEFORE_SAVE)
# All ranks exit together with these codes, so the first one to exit is not at fault.
COLLECTIVE_EXITS = {code for code in ExitCode if code not in (ExitCode.USER_ERROR, *PEER_FAILURES)}
CONNECTION_ERRORS = ("connection", "peer", "gloo", "nccl", "socket", "timed out", "broken pipe")


class Watchdog:
    """Watch one process and, through the store, its peers; created before rendezvous.

    Args:
        limits: Time limit of each phase.

    Attributes:
        limits: As given, for reports.
        children: Processes of ranks 1, 2, … that this process has started.
        has_saved: Whether this launch has committed a checkpoint, which selects the exit code.
        fault_hosts: Hosts of the ranks that caused the abort, if known; set before `on_abort`.
        setup_hint: Returns what to check if the processes of the run do not meet in time.
        on_abort: Called with the reason before the process exits; runs in a thread of its own.
        background_save: Returns step, start (`time.monotonic`) and thread of a save that runs while
            training continues.
        waits_for: Returns what this pipeline rank waits for from another stage, empty if nothing.
    """

    def __init__(self, limits: TimeLimits) -> None:
        self.limits = limits
        self._limits: dict[Phase, float] = {
            "set-up": limits.setup,
            "step": limits.step,
            "checkpoint": limits.checkpoint,
        }
        # A silent process soon exceeds the step limit too; silence is the better explanation, so
        # detect it first.
        self.silent_seconds = min(SILENT_SECONDS, self._limits["step"] / 2)
        self.children: list[Popen[Any]] = []
        self.has_saved = False
        self.fault_hosts: Sequence[str] = ()
        self._code: ExitCode | None = None
        self._aborting = False
        self._abort_lock = threading.Lock()
        self._exit_timer = ExitTimer()
        self._interval = HEARTBEAT_SECONDS
        self.setup_hint: Callable[[], str] = lambda: "Did every node start its processes?"
        self.on_abort: Callable[[str], None] = lambda reason: None
        self.background_save: Callable[[], tuple[int, float, int | None] | None] = lambda: None
        self.waits_for: Callable[[], str] = lambda: ""
        self._main_thread = threading.main_thread().ident
        rank = process_ranks()[0]
        self._state = Heartbeat(rank, host_name(), os.getpid())
        self._since = time.monotonic()
        self._connected = False
        self._last_contact, self._store_lost_at = 0.0, math.inf
        self._last_tick, self._tick_lock = time.monotonic(), threading.Lock()
        self._pauses: list[tuple[float, float]] = []  # end and duration
        self._closed = threading.Event()
        self._pause_backstop_on_sigtstp()
        self._arm_backstop()
        self._threads = [threading.Thread(target=self._watch, name="llamesh-watchdog", daemon=True)]
        self._threads[0].start()

    # ------------------------------------------------------------ called by the main thread

    def connect(self) -> None:
        """Start exchanging heartbeats; all ranks call it once the process group exists."""
        import torch.distributed as dist

        self._state.rank, self._size = dist.get_rank(), dist.get_world_size()
        self._interval = HEARTBEAT_SECONDS * max(1.0, self._size / RANKS_PER_HEARTBEAT)
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=60)
        server: list[Any] = [None, self._state.host]  # port and host
        if self._state.rank == 0:
            # Not the store of the process group: a blocked main thread holds its lock.
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            server[0] = self._store.port
        dist.broadcast_object_list(server)
        self._first_host = server[1]
        if self._state.rank != 0:
            self._store = dist.TCPStore(host, server[0], is_master=False, timeout=timeout)
        self._send_heartbeat(0)
        dist.barrier()  # every rank has written a heartbeat
        self._last_contact = time.monotonic()
        self._connected = True
        thread = threading.Thread(target=self._exchange, name="llamesh-heartbeat", daemon=True)
        self._threads.append(thread)
        thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Start a phase and its time limit."""
        self._state.phase, self._state.step, self._since = phase, step, time.monotonic()
        self._arm_backstop()

    @contextmanager
    def during(self, phase: Phase, step: int) -> Iterator[None]:
        """Enter a phase for the duration of the block, then restart the outer one."""
        outer = self._state.phase, self._state.step
        self.enter(phase, step)
        yield
        self.enter(*outer)

    def wait_for_abort(self, error: BaseException) -> None:
        """If `error` may be caused by a dead peer, wait for the abort that then ends this process.

        Returns if no abort comes: the fault is this process's own.
        """
        text = f"{type(error).__name__} {error}".lower()
        if any(word in text for word in CONNECTION_ERRORS):
            self._state.lost_peer = True
            time.sleep(3 * GRACE_SECONDS)

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of an abort."""
        failed = ExitCode.RANK_FAILED if self.has_saved else ExitCode.RANK_FAILED_BEFORE_SAVE
        return self._code or failed

    def publish(self, code: ExitCode, reason: str, hosts: Sequence[str] = ()) -> bool:
        """Make all other ranks exit with `code`, because this one leaves the step.

        Args:
            hosts: Hosts that caused it, if known.

        Returns:
            Whether this rank is the first one, which reports the reason.
        """
        self._code, self._aborting, self.fault_hosts = code, True, hosts
        if not self._connected:
            return True
        value = json.dumps([code, reason, hosts, self._state.rank])  # different on each rank
        first = True
        with suppress(Exception):
            first = self._store.compare_set("abort", "", value) == value.encode()
        if self._state.rank == 0:
            time.sleep(3 * HEARTBEAT_SECONDS)  # until the other ranks have read it
        return first

    def is_first_with(self, cause: str) -> bool:
        """Return whether no other rank has called this with the same cause, and report it then.

        Causes are the same if they differ in numbers or the host only.
        """
        if not self._connected:
            return True
        with suppress(Exception):  # the store disappears with rank 0
            common = without_rank(cause, self._state.host)
            digest = hashlib.sha256(common.encode(errors="replace")).hexdigest()
            is_first = bool(self._store.add(f"cause/{digest}", 1) == 1)
            if self._state.rank == 0:
                time.sleep(3 * HEARTBEAT_SECONDS)  # until the other ranks have asked the store
            return is_first
        return True

    def close(self, code: ExitCode | None = None) -> None:
        """Stop watching.

        Args:
            code: The process is about to exit by itself with this code; it does so in time, even
                if a file, a thread or another rank does not answer.
        """
        self._closed.set()
        self._exit_timer.cancel()
        if code is not None:
            limit = self._limits["step"] + BACKSTOP_SECONDS
            self._exit_timer.start(min(CLOSE_SECONDS, limit), code)
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:  # a daemon thread inside C++ crashes interpreter shutdown
            if thread is not threading.current_thread():
                thread.join(GRACE_SECONDS)

    # ------------------------------------------------------------ threads

    def _watch(self) -> None:
        """Check what one process can see: its children, contact with rank 0, its own set-up."""
        while not self._closed.wait(HEARTBEAT_SECONDS):
            self._skip_pause()
            self._check_children()
            beat = self._heartbeat(0)
            if not self._connected:
                if self._is_late(beat):
                    self._abort(f"{beat.late_message()}\n{self.setup_hint()}")
            elif time.monotonic() - self._store_lost_at > GRACE_SECONDS:
                self.fault_hosts = [self._first_host]
                reason = f"rank 0, which hosts the store, exited{stage_waits([beat])}"
                self._abort(reason, self._reports_rank_0())
            elif beat.rank and time.monotonic() - self._last_contact > self.silent_seconds:
                self.fault_hosts = [self._first_host]
                reason = f"no heartbeat from rank 0 for {self.silent_seconds:.0f} s"
                stack = f"stack of rank {beat.rank}:\n{beat.indented_stack}{stage_waits([beat])}"
                self._abort(f"{reason}; {stack}", self._reports_rank_0())

    def _exchange(self) -> None:
        """Send heartbeats to the store and look for an abort; rank 0 also checks all heartbeats."""
        seen: dict[int, tuple[int, float]] = {}
        interval, count, last = self._interval, 0, time.monotonic()
        while not self._closed.wait(interval):
            count += 1
            self._skip_pause()  # before the heartbeat, which would count it
            if time.monotonic() - last > interval + PAUSE_SECONDS:
                seen.clear()  # after a suspension every rank counts as just seen
            last = time.monotonic()
            try:
                self._send_heartbeat(count)
                if self._store.check(["abort"]) and not self._aborting:
                    self._follow(*json.loads(self._store.get("abort"))[:3])
                if self._state.rank == 0:
                    self._check_heartbeats(seen)
            except Exception:  # connection to the store; torch raises several types
                if not self._closed.is_set():
                    self._store_lost_at = time.monotonic()
                return
            self._last_contact = time.monotonic()

    def _check_heartbeats(self, seen: dict[int, tuple[int, float]]) -> None:
        """On rank 0: abort if a rank is silent or late.

        Args:
            seen: Count of the newest heartbeat of each rank and when it arrived; updated.
        """
        now, beats = time.monotonic(), self._read_heartbeats()
        for beat in beats:
            if seen.get(beat.rank, (-1, 0.0))[0] != beat.count:
                seen[beat.rank] = beat.count, now
        limit = self.silent_seconds
        if any(beat.lost_peer for beat in beats):
            limit = min(GRACE_SECONDS, limit)
        silent = [beat for beat in beats if now - seen[beat.rank][1] > limit]
        if silent:
            self.fault_hosts = hosts_at_fault(silent, beats)
            self._abort(
                "\n".join(
                    first.silent_message(now - seen[first.rank][1], others)
                    for first, *others in group_by_stack(silent)
                )
                + stage_waits([beat for beat in beats if beat not in silent])
            )
        if any(self._is_late(beat) for beat in beats):
            self.fault_hosts = hosts_at_fault([b for b in beats if not b.is_waiting], beats)
            # Ranks that wait for a stuck rank are late too: list ranks that do not wait first,
            # then small groups of equal stacks.
            groups = group_by_stack(beats)
            groups.sort(key=lambda group: (group[0].is_waiting, len(group)))
            messages = (group[0].late_message(group[1:]) for group in groups)
            self._abort("\n".join(messages) + stage_waits(beats))

    def _check_children(self) -> None:
        """Abort if a process started by this one has exited with an error."""
        for rank, child in enumerate(self.children, start=1):
            code = child.poll()
            if not code:
                continue
            if code in COLLECTIVE_EXITS:
                self._closed.wait(GRACE_SECONDS)  # this process exits too, perhaps later
                if self._closed.is_set():
                    return
                self._code = ExitCode(code)
            killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else ""
            self.fault_hosts = [self._state.host]
            cause = (killed or f"exited with code {code}") + self._last_positions(rank)
            self._abort(f"rank {rank} (pid {child.pid} on {self._state.host}) {cause}")

    # ------------------------------------------------------------ helpers

    def _skip_pause(self) -> None:
        """Exclude the time since the last call from all limits if the process was suspended."""
        with self._tick_lock:
            now = time.monotonic()
            last, self._last_tick = self._last_tick, now
            if now - last > PAUSE_SECONDS:  # Ctrl-Z, or a job that SLURM suspended: not a fault
                self._since += now - last
                self._last_contact += now - last
                self._pauses.append((now, now - last))

    def _follow(self, code: int, reason: str, hosts: Sequence[str] = ()) -> NoReturn:
        """Exit because another rank published an abort and reported it."""
        self._code, self.fault_hosts = ExitCode(code), hosts
        self._abort(reason, report=False, followed=True)

    def _abort(self, reason: str, report: bool = True, followed: bool = False) -> NoReturn:
        """Exit; rank 0 publishes the reason first and kills its children.

        Args:
            report: Print the reason, and on rank 0 record it.
            followed: Another rank has published and reported the abort.
        """
        self._abort_lock.acquire()  # the first reason counts; another thread waits for the exit
        self._aborting = True
        is_main = self._connected and self._state.rank == 0
        # PyTorch's recorder queries CUDA events with the GIL held, which a call that hangs in the
        # driver may block.
        self._exit_timer.start(ABORT_SECONDS, self.exit_code)
        self._arm_traceback(ABORT_SECONDS - 1)
        started = time.monotonic()
        reporting = threading.Thread(
            target=self._report, args=(reason, report, followed), daemon=True
        )
        reporting.start()
        if is_main:
            with suppress(Exception):
                self._store.compare_set("abort", "", json.dumps([self.exit_code, reason]))
        reporting.join(REPORT_SECONDS)
        if is_main:  # until the other ranks have read it
            time.sleep(max(0.0, started + 3 * HEARTBEAT_SECONDS - time.monotonic()))
        elif self._connected and not followed and _is_child_of_main():
            with suppress(OSError):  # a suspended main process would never exit
                os.kill(os.getppid(), signal.SIGKILL)
        self._kill_children()
        os._exit(self.exit_code)

    def _report(self, reason: str, report: bool, followed: bool) -> None:
        """Print and record an abort; may hang with a disk."""
        if report:
            _print(f"Aborting: {reason}")
        beat = self._heartbeat(0)
        if not beat.blocked and (blocked := describe(str(beat), blocked_threads())):
            _print(blocked)  # rank 0 does not know of it
        collectives = flight_recorder.dump(self._state.rank) if self._connected else None
        if report and collectives is not None:
            command = f"torchfrtrace --just_print_entries {collectives}"
            _print(f"Last collectives of each rank: {command}")
        if report or (followed and self._state.rank == 0):
            with suppress(Exception):
                self.on_abort(reason)

    def _kill_children(self) -> None:
        """Kill the processes that this one started, and report those that cannot exit."""
        for child in self.children:
            child.kill()
        deadline = time.monotonic() + KILL_SECONDS
        while any(each.poll() is None for each in self.children) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines = [
            describe(f"rank {rank} (pid {child.pid} on {self._state.host})", threads)
            for rank, child in enumerate(self.children, start=1)
            if child.poll() is None and (threads := blocked_threads(child.pid))
        ]
        if lines:
            run_limited(lambda: _print("\n".join(lines)), ABORT_SECONDS)  # the timer ends it

    def _arm_backstop(self) -> None:
        """Set timeouts in C, for a process whose Python threads do not run."""
        limit = self._limits[self._state.phase]
        if limit < math.inf:
            seconds = limit + BACKSTOP_SECONDS + 2 * (self._interval - HEARTBEAT_SECONDS)
            self._exit_timer.start(seconds + 1, self.exit_code)
            self._arm_traceback(seconds)
        else:
            self._exit_timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _arm_traceback(self, seconds: float) -> None:
        """Print the stacks of all threads after `seconds`, from C; the exit timer ends it."""
        faulthandler.dump_traceback_later(seconds, exit=sys.platform != "linux")

    def _pause_backstop_on_sigtstp(self) -> None:
        """Cancel the backstop on Ctrl-Z, or it would expire while the process is suspended."""

        def stop(number: int, frame: Any) -> None:
            self._exit_timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)

        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, stop)

    def _heartbeat(self, count: int) -> Heartbeat:
        """Return the state of the main thread or, if it is nearer to its limit, of the save."""
        now = time.monotonic()
        beat = replace(self._state, seconds=now - self._since, count=count)
        thread, save = self._main_thread, self.background_save()
        paused = sum(gap for end, gap in self._pauses if save is not None and save[1] < end)
        if save is not None and self._limits["checkpoint"] + save[1] < now + self._near_limit:
            late = replace(beat, phase="checkpoint", step=save[0], seconds=now - save[1] - paused)
            if self._seconds_left(late) < self._seconds_left(beat):
                beat, thread = late, save[2]
        beat.stack = stack_of(thread)
        with suppress(Exception):  # of the device, which training reports
            beat.waits_for = self.waits_for()
        if self._seconds_left(beat) < self._near_limit:
            beat.blocked = describe(str(beat), blocked_threads())
        return beat

    def _send_heartbeat(self, count: int) -> None:
        self._store.set(f"beat/{self._state.rank}", json.dumps(asdict(self._heartbeat(count))))

    def _is_late(self, beat: Heartbeat) -> bool:
        return self._seconds_left(beat) < 0

    def _seconds_left(self, beat: Heartbeat) -> float:
        return self._limits[beat.phase] - beat.seconds

    @property
    def _near_limit(self) -> float:
        return NEAR_LIMIT_SECONDS * self._interval

    def _last_positions(self, rank: int) -> str:
        """Return the last reported position of a rank, up to one heartbeat old, for a message.

        Ranks of other pipeline stages follow with what they wait for.
        """
        if not self._connected:
            return " in set-up"
        try:
            beats = self._read_heartbeats()
            beats[self._state.rank] = self._heartbeat(0)
            return f". {beats.pop(rank).last_seen}{stage_waits(beats)}"
        except Exception:
            return ""

    def _read_heartbeats(self) -> list[Heartbeat]:
        """Return the newest heartbeat of each rank from the store."""
        values = self._store.multi_get([f"beat/{rank}" for rank in range(self._size)])
        return [Heartbeat(**json.loads(value)) for value in values]

    def _reports_rank_0(self) -> bool:
        """Return whether this rank reports the loss of rank 0: one process per node does."""
        return self._state.rank == 1 or process_ranks()[1] == 0


def _is_child_of_main() -> bool:
    """Return whether the main process of the run started this one and is still its parent."""
    return os.environ.get("LLAMESH_MAIN_PID") == str(os.getppid())


def _print(text: str) -> None:
    with suppress(Exception):  # closed, or on a full disk
        print(text, file=sys.stderr, flush=True)
