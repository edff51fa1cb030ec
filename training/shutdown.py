"""The ways a launch ends: last messages, the `stop` event and the exit code.

A run that is requested or forced to stop exits with a code that gives the reason
(`resilience.exit_codes`). Waits for other processes are limited, since a peer may be blocked in a
collective that never completes.
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import NoReturn

from data.errors import DataError
from formats.errors import FormatError
from resilience.errors import (
    LaunchError,
    OutOfMemory,
    exceeded_limit,
    is_connection_fault,
    is_hardware_fault,
)
from resilience.event_log import EventLog
from resilience.exit_codes import ExitCode
from resilience.exit_timer import run_limited
from resilience.goodput import Goodput, compute_goodput
from resilience.lock import RunLock
from resilience.processes import is_first_process, process_ranks
from resilience.run_folder import RunFolder, RunFolderError
from resilience.slurm import host_name, launch_id
from resilience.watchdog import Watchdog
from training.config_validation import ConfigError
from training.run import Run
from training.run_summary import resume_command, summary

LEAVE_SECONDS = 5.0  # for a message and the removal of the lock file, whose disk may hang
USER_ERRORS = (ConfigError, DataError, FormatError, RunFolderError)  # the first process prints
LAST_SAVE_SECONDS = 60.0  # for a save that is running when the run aborts

STOP_REASONS = {
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TERMINATED: "received SIGTERM or SIGHUP",
    ExitCode.STOPPED: "received SIGUSR1 or reached the time limit",
    ExitCode.SAVE_FAILED: "a checkpoint could not be saved",
}


def exit_early(lock: RunLock | None, code: ExitCode) -> NoReturn:
    """Exit before the first step; the first process prints the reason."""
    if lock is not None:
        run_limited(lock.abandon, LEAVE_SECONDS)
    if is_first_process():
        reason = STOP_REASONS[code]
        _report(f"{reason[0].upper()}{reason[1:]} before the first step.")
    os._exit(code)


@contextmanager
def published_on_error(watchdog: Watchdog) -> Iterator[None]:
    """Make all ranks exit with the same code if this one fails during set-up.

    That is, if it is out of memory, or has a fault of the machine. The others would wait for it in
    a collective. The trace of an unexpected error is printed by the first rank that has it.
    """
    try:
        yield
    except OutOfMemory as error:
        error.is_first = watchdog.publish(ExitCode.OUT_OF_MEMORY, str(error).splitlines()[0])
        raise
    except (LaunchError, *USER_ERRORS):
        raise
    except Exception as error:
        if (fault := machine_fault(error)) is None:
            if not watchdog.is_first_with("".join(traceback.format_exception(error))):
                os._exit(ExitCode.USER_ERROR)
            raise
        first_to_fail = watchdog.publish(watchdog.exit_code, *fault)
        if is_first_process():  # it prints a LaunchError, and records the fault of another rank
            watchdog.on_abort(fault[0])
        elif first_to_fail:
            _report(f"Error: {fault[0]}")
        raise LaunchError(fault[0], watchdog.exit_code) from error


def machine_fault(error: Exception) -> tuple[str, list[str]] | None:
    """Return message and hosts of a fault that a restart can cure; None for another error."""
    rank, host = process_ranks()[0], host_name()
    text = " ".join(str(error).split())
    if is_hardware_fault(text):
        return f"rank {rank} on {host} has a hardware fault: {text}", [host]
    if (limit := exceeded_limit(error)) is not None:
        return f"rank {rank} on {host}: {limit}", []
    if is_connection_fault(error):  # the network or any of its ends
        return f"rank {rank} on {host} lost its connection to other ranks: {text}", []
    return None


def report_signal(run: Run, number: signal.Signals, again: bool) -> None:
    """Print at once what a signal does; a second Ctrl-C exits without saving.

    Called in a separate thread: the main thread may be compiling, saving or inside a long step.
    """
    if again:
        run_limited(partial(_leave, run), LEAVE_SECONDS)
        os._exit(ExitCode.INTERRUPTED)
    cause, more = f"Received {number.name}: ", ""
    if number == signal.SIGINT:
        cause, more = "", " Press Ctrl-C again to exit at once, without saving."
    run.console.note(f"{cause}Stopping after this step, with a checkpoint.{more}")


def _leave(run: Run) -> None:
    """Print how to resume and release the folder, before an exit without a checkpoint."""
    if run.fabric.is_global_zero:
        run.console.stop()
        _report(f"Exited without saving the last steps. {_resume_hint(run)}")
    if run.lock is not None:
        run.lock.release()


def stop_run(run: Run, code: ExitCode, reason: str = "") -> NoReturn:
    """Stop between two steps, on all ranks."""
    run.console.stop()
    reason = reason or STOP_REASONS[code]
    goodput = _record_stop(run, code.name.lower(), code, why=reason)
    stopped = f"Stopped after step {run.position.step}: {reason}."
    rows = [f"{name} {value}" for name, value in goodput]
    run.console.note("\n".join([stopped, *rows, _resume_hint(run)]))
    _exit(run, code)


def abort(run: Run, error: Exception) -> NoReturn:
    """Exit in the middle of a step after an error of this process, and report it from here.

    If the error was caused by a dead peer, the watchdog ends the process instead.
    """
    run.console.stop()
    if isinstance(error, DataError):
        code, message = ExitCode.DATA, str(error)
        run.saver.finish(LAST_SAVE_SECONDS)  # peers are still writing their shards
    elif isinstance(error, RunFolderError):
        code, message = error.code, str(error)
    elif isinstance(error, OutOfMemory):
        code, message = ExitCode.OUT_OF_MEMORY, str(error)
        if not run.watchdog.publish(code, message.splitlines()[0]):
            _exit(run, code)  # another rank reports it
    elif (fault := machine_fault(error)) is not None:
        message, hosts = fault
        if not hosts and exceeded_limit(error) is None:
            run.watchdog.wait_for_abort(error)
            message += "\n" + "".join(traceback.format_exception(error))
        code = run.watchdog.exit_code
        is_first = run.watchdog.publish(code, fault[0], hosts)
        if run.event_log is not None:
            write_fault(run.event_log, run.watchdog, run.position.step, fault[0])
        if not is_first:
            _exit(run, code)
    else:
        run.watchdog.wait_for_abort(error)
        code, message = ExitCode.USER_ERROR, "".join(traceback.format_exception(error))
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    _record_stop(run, reason, code)
    overrides = error.overrides if isinstance(error, OutOfMemory) else ""
    if run.watchdog.is_first_with(message):  # a file may be missing, or a fault occur, on all ranks
        step, hint = run.position.step + 1, _resume_hint(run, overrides)
        _report(f"Stopped in step {step}: {message}\n{hint}")
    _exit(run, code)


def record_fault(run: Run, reason: str) -> None:
    """Record an abort by the watchdog; called in a watchdog thread.

    On rank 0, or on the rank that reports the loss of rank 0.
    """
    run.console.stop()
    log = run.event_log or EventLog(run.folder.event_log)
    write_fault(log, run.watchdog, run.position.step, reason)
    if run.watchdog.exit_code != ExitCode.OUT_OF_MEMORY:  # the rank prints it, with a change
        _report(_resume_hint(run))


def record_setup_fault(folder: RunFolder, watchdog: Watchdog, reason: str) -> None:
    """Record an abort before the run is set up; called in a watchdog thread."""
    if folder.path.exists():
        write_fault(EventLog(folder.event_log), watchdog, None, reason)


def write_fault(log: EventLog, watchdog: Watchdog, step: int | None, reason: str) -> None:
    """Write a `fault` event with launch and hosts, for slurm/requeue.py."""
    code, hosts = int(watchdog.exit_code), [*watchdog.fault_hosts]
    log.append("fault", step=step, reason=reason, code=code, hosts=hosts, launch=launch_id())


def finish(run: Run) -> None:
    """Close the logs of a finished run and print its summary; exit if no step was finite."""
    from resilience.loss_monitor import NEVER_FINITE

    if run.monitor.has_skipped_all(run.position.step):
        stop_run(run, ExitCode.DIVERGED, f"every update was skipped; {NEVER_FINITE}")
    goodput = _record_stop(run, "finished", ExitCode.FINISHED)
    if run.metrics is not None:
        run.metrics.close()
    with run.optional("the summary"):
        title, rows, commands = summary(run)
        run.console.summary(title, [*rows, *goodput], commands)
    run.watchdog.close(ExitCode.FINISHED)


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def goodput_row(goodput: Goodput) -> tuple[str, str]:
    """Return name and text of the goodput for the console."""
    from training.console import duration

    steps = f" ({goodput.lost_steps} steps)" if goodput.lost_steps else ""
    launches = f" ({goodput.starts} launches)" if goodput.starts > 1 else ""
    parts = (
        (goodput.productive, "productive"),
        (goodput.stalled, "stalled"),
        (goodput.lost, f"lost{steps}"),
        (goodput.restart, f"starting{launches}"),
        (goodput.between, "between launches"),
        (goodput.rest, "other"),
    )
    shown = [f"{duration(seconds)} {name}" for seconds, name in parts if round(seconds)]
    return (
        "goodput",
        f"{goodput.ratio:.1%} of {duration(goodput.wall)}: {', '.join(shown)}",
    )


def _record_stop(run: Run, reason: str, code: ExitCode, **more: str) -> list[tuple[str, str]]:
    """Record the end of this launch; return the goodput of the run as a console row."""
    if run.event_log is None:
        return []
    fields = {"step": run.position.step, "reason": reason, "code": int(code), **more}
    fields |= run.clock.spent()
    rows = []
    with run.optional("the goodput"):
        goodput = compute_goodput(run.event_log.read(), alive_until=datetime.now(UTC))
        rows = [goodput_row(goodput)] if goodput.starts else []  # else the event log was removed
        fields["goodput"] = goodput.to_dict()
    run.record("stop", **fields)
    return rows


def _resume_hint(run: Run, overrides: str = "") -> str:
    with run.optional("the command to resume"):
        steps = run.folder.committed_steps()
        if not steps:
            return "No checkpoint saved yet."
        command = f"{resume_command(run.config, run.processes)} {overrides}".strip()
        return f"Newest checkpoint: step {steps[-1]}. Resume with: {command}"
    return "Resume with the same command."


def _exit(run: Run, code: ExitCode) -> NoReturn:
    """Exit without destroying the process group, which could block."""
    try:
        if run.metrics is not None:
            run.metrics.close()
        run.watchdog.close(code)
        if run.lock is not None:
            run.lock.release()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
