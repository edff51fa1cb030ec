"""Parts of a `bench.gpu` report that run in milliseconds, for tests of its runner."""

import os
import time

from bench.gpu.parts import Rows


def environment(reduced: bool) -> Rows:
    yield "environment", {"device": "none", "commit": os.environ.get("COMMIT", "abc")}


def no_gpu(reduced: bool) -> Rows:
    yield from ()
    raise SystemExit("torch sees no GPU")


def passing(reduced: bool) -> Rows:
    yield "first", {"passed": True, "process": os.getpid()}
    yield "second", {"value": 2.5}


def missed(reduced: bool) -> Rows:
    yield "speed", {"passed": False, "value": 1}


def failing(reduced: bool) -> Rows:
    yield "before", {"passed": True}
    raise ValueError("kernel not found")


def hanging(reduced: bool) -> Rows:
    yield "before", {"passed": True}
    print("compiling")
    if os.fork() == 0:  # a process of the part's own, which must not survive it
        time.sleep(60)
    time.sleep(60)


def inapplicable(reduced: bool) -> Rows:
    yield "nccl", {"skipped": "1 GPU is visible"}
