"""Named benchmarks through lm-eval, the extra `lm-eval`: its tasks and yours, on our model.

lm-eval knows the tasks, their prompts and their scores. What it asks is answered by
`evaluation.language_model`, which is imported only when there is something to ask.
"""

import contextlib
import difflib
import importlib.util
import io
import json
import os
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.errors import TaskError

if TYPE_CHECKING:
    from evaluation.language_model import LlameshModel

BOOTSTRAPS = 1000
"""Resamplings behind a standard error that has no closed form: known to about 2%."""

TOLD = ("results", "groups", "versions", "n-shot", "n-samples")
"""What of lm-eval's results is reported."""


def task_errors(tasks: Sequence[str], folder: str | None) -> list[str]:
    """Why these tasks cannot be run, as messages that name key, value, rule and remedy.

    Args:
        tasks: Names, patterns of names like `mmlu_*`, or task files.
        folder: With task files of the user's own, which win over lm-eval's.
    """
    if importlib.util.find_spec("lm_eval") is None:
        return [
            f"tasks ({', '.join(tasks)}) need the package lm-eval: install the extra `lm-eval` "
            "(pip install '.[lm-eval]'), or use tasks=[]"
        ]
    if folder is not None and not Path(folder).is_dir():
        return [f"task_folder ({folder}) is not a folder: name the one that your task files are in"]
    manager = _manager(tasks, folder)
    return [_unknown(each, manager.all_tasks) for each in tasks if not _named(each, manager)]


def run_tasks(
    lm: "LlameshModel",
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Scores on the tasks, the same on every process; the first one shows progress.

    Args:
        lm: Every process has its own and calls this.
        tasks: As in `task_errors`, which found none.
        folder: As there.
        num_fewshot: Examples before each question; None for what each task has. Tasks that are
            made for none stay without.
        limit: Samples of each task, the first ones; None for all.

    Returns: lm-eval's `results`, with standard errors on the first process, `groups` where there
        are some, `versions`, `n-shot` and `n-samples`, by task.

    Raises:
        TaskError: a task's data cannot be loaded, or it asks for what we do not do.
    """
    from lm_eval.evaluator import evaluate

    # A pool of forked processes would inherit threads and devices.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.ExitStack() as stack:
        if not lm.is_first:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        found = evaluate(
            lm,
            _load(tasks, folder, num_fewshot),
            limit=limit,
            bootstrap_iters=BOOTSTRAPS if lm.is_first else 0,
            log_samples=False,
        )
    # numpy's numbers are float's here: this goes to a JSON file.
    return {key: json.loads(json.dumps(found[key], default=float)) for key in TOLD if key in found}


def _load(tasks: Sequence[str], folder: str | None, num_fewshot: int | None) -> Any:
    """Tasks with their data, as lm-eval's evaluator takes them.

    Raises:
        TaskError: the data cannot be loaded, or the task runs code that a model wrote.
    """
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # What tasks draw is what they draw in lm-eval's own program.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = _manager(tasks, folder)
    names = {name: None for asked in tasks for name in _named(asked, manager)}  # each once
    try:
        loaded = manager.load([*names])
    except Exception as error:  # of the network, a file, a task's own code: anything
        raise TaskError(
            f"tasks ({', '.join(tasks)}) cannot be loaded ({type(error).__name__}: {error}): "
            "check the task's file and its data; what lies on a hub needs the network once"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise TaskError(
                f"task {name} runs code that a model wrote, or shows it more than text, which is "
                "not done here: leave it out of tasks"
            )
        # A task that says 0 itself is made for none.
        shots = task.get_config("num_fewshot")
        if shots is None or (num_fewshot is not None and shots != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _manager(tasks: Sequence[str], folder: str | None) -> Any:
    """lm-eval's index of tasks: of the folder alone where it has all, as lm-eval's takes seconds.

    A group of the folder may hold tasks of lm-eval, so it does not count.
    """
    if folder is not None:
        own = _index(folder, include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return _index(folder, include_defaults=True)


@cache
def _index(folder: str | None, include_defaults: bool) -> Any:
    """The tasks of a folder, and of lm-eval."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _named(asked: str, manager: Any) -> list[str]:
    """The names that one entry of `tasks` stands for; none where it is unknown."""
    if asked.endswith(".yaml") and Path(asked).is_file():
        return [asked]
    return list(manager.match_tasks([asked]))


def _unknown(asked: str, known: Sequence[str]) -> str:
    """What to tell of a name that no task has."""
    near = difflib.get_close_matches(asked, known, n=3)
    remedy = f"use {' or '.join(near)}" if near else "use a name of `lm-eval ls tasks`"
    return f"tasks ({asked}) is neither a task nor a group: {remedy}, or set task_folder to yours"
