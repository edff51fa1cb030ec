"""Exit codes of the programs, for scripts and schedulers.

docs/faults.md has the table for users. Codes below 128 follow BSD's sysexits.h where possible;
128 + N is the shell convention for signal N.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Why a program exited."""

    FINISHED = 0
    USER_ERROR = 1  # invalid configuration, data or run folder before launch; unexpected error
    DATA = 65  # training data became unreadable
    NO_CHECKPOINT = 66  # checkpoints exist, but none is valid
    REWINDS = 67  # the batches that earlier rewinds excluded are unknown: rewinds.json is damaged
    DIVERGED = 70  # losses or gradients still bad after all allowed rewinds
    RANK_FAILED = 71  # a rank died or hung after this launch had saved a checkpoint
    RANK_FAILED_BEFORE_SAVE = 72  # same, before the first save: a relaunch may fail the same way
    LOCKED = 73  # another run holds the run folder
    SAVE_FAILED = 74  # a checkpoint could not be saved
    STOPPED = 75  # SIGUSR1 or the time limit: saved, to be relaunched
    OUT_OF_MEMORY = 76  # a rank is out of memory; a relaunch would fail the same way
    CORRUPTION = 77  # copies of replicated state differed again: probably a hardware fault
    INTERRUPTED = 130  # SIGINT: saved, if at least one step was done
    TERMINATED = 143  # SIGTERM: saved, if at least one step was done
