"""How a run ends, in one number: what scripts and schedulers decide by.

The table for people is in docs/faults.md. Below 128 the numbers are those of BSD's sysexits.h where
one fits; 128 + N is the shells' way to tell of signal N.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Why a program of Llamesh ended."""

    FINISHED = 0
    USER_ERROR = (
        1  # not started: configuration, data or run folder; or an error that nobody foresaw
    )
    DATA = 65  # the training data cannot be read on
    NO_CHECKPOINT = 66  # checkpoints exist and none is whole
    DIVERGED = 70  # losses or gradients stay bad after every rewind allowed
    RANK_FAILED = 71  # a process of the run died or got stuck, after this start had saved
    RANK_FAILED_BEFORE_SAVE = 72  # the same, before it had: the next start may well end alike
    LOCKED = 73  # another run is at work in the folder
    SAVE_FAILED = 74  # a checkpoint could not be saved
    STOPPED = 75  # SIGUSR1 or the time limit: saved, to be started again
    INTERRUPTED = 130  # SIGINT: saved, once there was a step to save
    TERMINATED = 143  # SIGTERM: saved, once there was a step to save
