"""How a start of a run ends: its last lines, the ledger's, and the exit code.

A run that was asked to stop, or must, leaves with a code that tells why (`resilience.exit_codes`).
Nobody waits for anybody then: a peer may stand in a collective call that will never complete.
"""

import os
import sys
import traceback
from typing import NoReturn

from data.errors import DataError
from parallel.mesh import is_first_process
from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolderError
from training.run import Run
from training.run_summary import resume_command, summary

LAST_SAVE_SECONDS = 60.0  # for one that is being written while the run gives up

# What a line says of a run that was asked to stop.
ASKED = {
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TERMINATED: "asked to stop by SIGTERM",
    ExitCode.STOPPED: "asked to stop by SIGUSR1 or the time limit",
    ExitCode.SAVE_FAILED: "a checkpoint could not be saved",
}


def end_early(code: ExitCode) -> NoReturn:
    """Ends a start that was asked to stop before its first step; one process tells it."""
    if is_first_process():
        print(
            f"{ASKED[code][0].upper()}{ASKED[code][1:]} before the first step.",
            file=sys.stderr,
            flush=True,
        )
    os._exit(code)


def stop_run(run: Run, code: ExitCode, why: str = "") -> NoReturn:
    """Ends a run that stands between two steps, on every rank alike."""
    run.console.stop()
    why = why or ASKED[code]
    goodput = _record_stop(run, code.name.lower(), code, why=why)
    told = "".join(f"\n{name} {value}" for name, value in goodput)
    run.console.note(f"Stopped after step {run.position.step}: {why}.{told}\n{_kept(run)}")
    _exit(run, code)


def abort(run: Run, error: Exception) -> NoReturn:
    """Ends a run in the middle of a step: whoever met the fault tells it, nobody else may know.

    Where the fault is a peer's, this does not return: the watchdog ends the process.
    """
    run.console.stop()
    if isinstance(error, DataError):
        code, told = ExitCode.DATA, str(error)
        run.saver.finish(LAST_SAVE_SECONDS)  # peers that train on still write their parts
    elif isinstance(error, RunFolderError):
        code, told = error.code, str(error)
    else:
        run.watchdog.explain(error)
        code, told = ExitCode.USER_ERROR, "".join(traceback.format_exception(error))
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    _record_stop(run, reason, code)
    print(
        f"Stopped in step {run.position.step + 1}: {told}\n{_kept(run)}",
        file=sys.stderr,
        flush=True,
    )
    _exit(run, code)


def record_fault(run: Run, told: str) -> None:
    """What the watchdog does before it ends rank 0, in a thread: the run's last words."""
    run.console.stop()
    run.record("fault", step=run.position.step, told=told, code=int(run.watchdog.exit_code))
    print(_kept(run), file=sys.stderr, flush=True)


def finish(run: Run) -> None:
    """Closes the logs, and says what came out and how to go on."""
    goodput = _record_stop(run, "finished", ExitCode.FINISHED)
    if run.metrics is not None:
        run.metrics.close()
    title, rows, commands = summary(run.config, run.processes, run.position, run.last_metrics)
    run.console.summary(title, [*rows, *goodput], commands)
    run.watchdog.close()


def _record_stop(run: Run, reason: str, code: ExitCode, **more: str) -> list[tuple[str, str]]:
    """Writes the end of this start to the ledger; returns the account of the run as rows."""
    goodput = run.goodput()
    if goodput is None:
        return []
    fields = {"step": run.position.step, "reason": reason, "code": int(code), **more}
    run.record("stop", **fields, **run.clock.spent(), goodput=goodput.figures())
    return goodput.rows()


def _kept(run: Run) -> str:
    """What is saved, and how to go on from it."""
    saved = run.folder.committed_steps()
    if not saved:
        return "Nothing is saved yet."
    return f"Saved up to step {saved[-1]}; go on with: {resume_command(run.processes)}"


def _exit(run: Run, code: ExitCode) -> NoReturn:
    """Ends this process without an orderly end of the process group."""
    if run.metrics is not None:
        run.metrics.close()
    run.watchdog.close()
    if run.lock is not None:
        run.lock.release()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
