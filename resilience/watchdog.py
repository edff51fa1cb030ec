"""The watchdog: no dead or stuck process keeps the others waiting for ever.

Each process tells a small store, kept by rank 0 beside the training, how far it is and where its
main thread stands. Rank 0 decides who is to blame, all learn it, and every process ends itself:
a peer that waits in a collective call could not be told otherwise. So even of a process that was
killed, frozen or lost with its machine there is a last place to tell.
"""

import faulthandler
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from subprocess import Popen
from typing import Any, NoReturn

from resilience.config import WatchdogConfig
from resilience.exit_codes import ExitCode
from resilience.heartbeat import Beat, Phase, indented, stack_of, told_late, told_silent

BEAT_SECONDS = 1.0  # between two signs of life
RANKS_A_BEAT = 256  # more ranks than these beat less often: rank 0 reads them all
SILENT_SECONDS = 60.0  # without a sign of life a process is dead or frozen
GRACE_SECONDS = 5.0  # for processes to leave by themselves, as they do together
PAUSE_SECONDS = 5.0  # that this thread did not run: the process did not
BACKSTOP_SECONDS = 60.0  # beyond its limit, for a process whose Python runs no more

DEATHS = (ExitCode.RANK_FAILED, ExitCode.RANK_FAILED_BEFORE_SAVE)
# With these all processes leave together: whoever is first is no fault.
TOGETHER = {code for code in ExitCode if code not in (ExitCode.USER_ERROR, *DEATHS)}


class Watchdog:
    """One a process, from before the processes find each other until it ends.

    Args:
        config: How long each phase may take.
    """

    def __init__(self, config: WatchdogConfig) -> None:
        self._limits: dict[Phase, float | None] = {
            "set-up": config.setup_seconds,
            "step": config.step_seconds,
            "checkpoint": config.checkpoint_seconds,
        }
        # Silence is told before lateness: it says more, and a silent process is soon late.
        self.silent_seconds = min(SILENT_SECONDS, (config.step_seconds or math.inf) / 2)
        self.has_saved = False  # this start of the run, a checkpoint
        self.on_verdict: Callable[[str], None] = lambda told: None
        self._main = threading.main_thread().ident
        self._phase: Phase = "set-up"
        self._step, self._since = 0, time.monotonic()
        self._suspects = False
        self._children: list[Popen[Any]] = []
        self._rank: int | None = None
        self._connected = False
        self._last_answer = 0.0
        self._lost: float | None = None
        self._closed = threading.Event()
        self._let_terminal_stop_us()
        self._arm()
        self._threads = [threading.Thread(target=self._watch, name="llamesh-watchdog", daemon=True)]
        self._threads[0].start()

    # ------------------------------------------------------------ what the main thread calls

    def watch_children(self, children: Sequence["Popen[Any]"]) -> None:
        """The processes of ranks 1, 2, … that this one has started itself."""
        self._children = list(children)

    def connect(self) -> None:
        """Begins to look after each other; every rank calls it when their group is there."""
        import torch.distributed as dist

        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=60)
        port: list[Any] = [None]
        if self._rank == 0:
            # Not the group's own store: a main thread that waits in a call holds that one's lock.
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port[0] = self._store.port
        dist.broadcast_object_list(port)
        if self._rank != 0:
            self._store = dist.TCPStore(host, port[0], is_master=False, timeout=timeout)
        self._tell(0)
        dist.barrier()  # from here on there is a beat of every rank
        self._last_answer = time.monotonic()
        self._connected = True
        talks = threading.Thread(target=self._talk, name="llamesh-heartbeat", daemon=True)
        self._threads.append(talks)
        talks.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Another piece of work begins, and its time counts from now."""
        self._phase, self._step, self._since = phase, step, time.monotonic()
        self._arm()

    @contextmanager
    def during(self, phase: Phase, step: int) -> Iterator[None]:
        """Around a piece of work in the middle of another, which then has all its time again."""
        outer, outer_step = self._phase, self._step
        self.enter(phase, step)
        yield
        self.enter(outer, outer_step)

    def explain(self, error: BaseException) -> None:
        """Where an error may come of a peer's end, waits for the verdict, which ends the process.

        It returns where there is none: then the fault is this process's own.
        """
        words = ("connection", "peer", "gloo", "nccl", "socket", "timed out", "broken pipe")
        told = f"{type(error).__name__} {error}".lower()
        if any(word in told for word in words):
            self._suspects = True
            time.sleep(3 * GRACE_SECONDS)

    @property
    def exit_code(self) -> ExitCode:
        """What a verdict ends this process with."""
        return ExitCode.RANK_FAILED if self.has_saved else ExitCode.RANK_FAILED_BEFORE_SAVE

    def close(self) -> None:
        """The process ends by itself: nobody need look after it any more."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:  # in the middle of C++ they would not survive Python's end
            if thread is not threading.current_thread():
                thread.join(GRACE_SECONDS)

    # ------------------------------------------------------------ threads

    def _watch(self) -> None:
        """What this process can see alone: its children, rank 0's silence, its own set-up."""
        last = time.monotonic()
        while not self._closed.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - last > PAUSE_SECONDS:  # all of us were stopped, as by Ctrl-Z: that is no fault
                self._since += now - last
                self._last_answer += now - last
            last = now
            self._look_at_children()
            beat = self._beat(0)
            if not self._connected:
                if self._is_late(beat):
                    self._end(f"{told_late(beat)}\nDid every node start its processes?")
            elif self._lost is not None and time.monotonic() - self._lost > GRACE_SECONDS:
                self._end("rank 0 is gone, and its store with it", self._tells_of_rank_0())
            elif self._rank and time.monotonic() - self._last_answer > self.silent_seconds:
                told = f"rank 0 gives no sign of life for {self.silent_seconds:.0f} s"
                self._end(f"{told}; here:\n{indented(beat.stack)}", self._tells_of_rank_0())

    def _talk(self) -> None:
        """Tells the store how this process is, and hears what rank 0 makes of all."""
        assert self._rank is not None
        seen: dict[int, tuple[int, float]] = {}
        pause = BEAT_SECONDS * max(1.0, self._size / RANKS_A_BEAT)
        count, last = 0, time.monotonic()
        while not self._closed.wait(pause):
            count += 1
            if time.monotonic() - last > pause + PAUSE_SECONDS:
                seen.clear()  # and hear everybody anew
            last = time.monotonic()
            try:
                self._tell(count)
                if self._store.check(["verdict"]):
                    self._end("", tells=False)
                if self._rank == 0:
                    self._judge(seen)
            except Exception:  # the store's connection, whatever kind of error torch makes of it
                if not self._closed.is_set():
                    self._lost = time.monotonic()
                return
            self._last_answer = time.monotonic()

    def _judge(self, seen: dict[int, tuple[int, float]]) -> None:
        """Rank 0: who is silent or late; with the first found the run ends."""
        now = time.monotonic()
        values = self._store.multi_get([f"beat/{rank}" for rank in range(self._size)])
        beats = [Beat(**json.loads(value)) for value in values]
        for beat in beats:
            if seen.get(beat.rank, (-1, 0.0))[0] != beat.count:
                seen[beat.rank] = beat.count, now
        patience = self.silent_seconds
        if any(beat.suspects for beat in beats):
            patience = min(GRACE_SECONDS, patience)
        silent = [b for b in beats if now - seen[b.rank][1] > patience]
        late = [b for b in beats if self._is_late(b)]
        if silent:
            self._end("\n".join(told_silent(beat, now - seen[beat.rank][1]) for beat in silent))
        if late:
            # Who waits for another is as late as that one: the odd ones are told first.
            by_place: dict[tuple[str, ...], list[Beat]] = {}
            for beat in beats:
                by_place.setdefault(tuple(beat.stack), []).append(beat)
            groups = sorted(by_place.values(), key=lambda group: (group[0].waits, len(group)))
            self._end("\n".join(told_late(group[0], group[1:]) for group in groups))

    def _look_at_children(self) -> None:
        """The main process of a run that starts its own: whether one of them has ended."""
        for rank, child in enumerate(self._children, start=1):
            code = child.poll()
            if not code:
                continue
            if code in set(TOGETHER):
                self._closed.wait(GRACE_SECONDS)  # we leave with it, and may be slower
                if self._closed.is_set():
                    return
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}"
            else:
                how = f"ended with exit code {code}"
            place = self._last_place(rank)
            self._end(f"rank {rank} (process {child.pid} on {socket.gethostname()}) {how}{place}")

    # ------------------------------------------------------------ pieces

    def _end(self, told: str, tells: bool = True) -> NoReturn:
        """Ends this process; rank 0 has told all others and takes its children along."""
        if tells:
            print(f"The run ends: {told}", file=sys.stderr, flush=True)
            with suppress(Exception):
                self.on_verdict(told)
        if self._rank == 0 and self._connected:
            with suppress(Exception):
                self._store.set("verdict", told)
            time.sleep(3 * BEAT_SECONDS)  # the others read it
        elif told and self._rank is not None and _is_child_of_main():
            with suppress(OSError):  # a frozen main process would stay for ever
                os.kill(os.getppid(), signal.SIGKILL)
        for child in self._children:
            child.kill()
        os._exit(self.exit_code)

    def _arm(self) -> None:
        """The last resort, in C: a process whose Python does not run cannot watch itself."""
        limit = self._limits[self._phase]
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(limit + BACKSTOP_SECONDS, exit=True)

    def _let_terminal_stop_us(self) -> None:
        """Ctrl-Z stops the last resort too, which would end the process as it goes on."""

        def stop(number: int, frame: Any) -> None:
            faulthandler.cancel_dump_traceback_later()
            os.kill(os.getpid(), signal.SIGSTOP)

        if signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, stop)

    def _beat(self, count: int) -> Beat:
        seconds = time.monotonic() - self._since
        rank = int(os.environ.get("LOCAL_RANK", 0)) if self._rank is None else self._rank
        stack = stack_of(self._main)
        work = self._phase, self._step, seconds, count, self._suspects, stack
        return Beat(rank, socket.gethostname(), os.getpid(), *work)

    def _tell(self, count: int) -> None:
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat(count))))

    def _is_late(self, beat: Beat) -> bool:
        limit = self._limits[beat.phase]
        return limit is not None and beat.seconds > limit

    def _last_place(self, rank: int) -> str:
        """Where a rank was when it last told, up to a beat before its end, if it ever did."""
        if not self._connected:
            return " in set-up"
        try:
            beat = Beat(**json.loads(self._store.get(f"beat/{rank}")))
        except Exception:
            return ""
        return f"; last seen in {beat.work}, here:\n{indented(beat.stack)}"

    def _tells_of_rank_0(self) -> bool:
        """One process of each node is enough."""
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
        return self._rank == 1 or local_rank == "0"


def _is_child_of_main() -> bool:
    """Whether this process was started by the run's main one, which is still its parent."""
    return os.environ.get("LLAMESH_MAIN_PID") == str(os.getppid())
