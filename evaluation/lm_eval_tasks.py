"""Run benchmarks with lm-eval (extra `lm-eval`): its own tasks and the user's task files.

lm-eval provides tasks, prompts and metrics; `evaluation.lm_eval_model` computes the answers. The
package is imported only when tasks are configured.
"""

import contextlib
import difflib
import importlib.util
import io
import json
import os
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.errors import TaskError

if TYPE_CHECKING:
    from evaluation.lm_eval_model import LlameshLM

BOOTSTRAP_ITERS = 1000
"""Resamples for standard errors without a closed form; accurate to about 2%."""

REPORTED_KEYS = ("results", "groups", "versions", "n-shot", "n-samples")
"""Keys of lm-eval's result that are reported."""


def task_errors(tasks: Sequence[str], folder: str | None, cp: int = 1) -> Iterator[str]:
    """Yield the errors in the configuration of the tasks.

    Args:
        tasks: Task or group names, patterns like `mmlu_*`, or paths of task files.
        folder: Folder with the user's task files, which take precedence over lm-eval's.
        cp: Size of the context-parallel axis.
    """
    if cp > 1:
        yield (
            f"parallel.cp={cp} splits sequences, but tasks generate text token by token; use "
            "parallel.cp=1"
        )
    if importlib.util.find_spec("lm_eval") is None:
        yield (
            f"tasks={list(tasks)} requires the package lm-eval; install the extra `lm-eval` "
            "(pip install '.[lm-eval]'), or use tasks=[]"
        )
    elif folder is not None and not Path(folder).is_dir():
        yield f"task_folder={folder} is not a folder; use the folder with your task files"
    else:
        manager = _manager(tasks, folder)
        yield from (_unknown_task(t, manager.all_tasks) for t in tasks if not _match(t, manager))


def run_tasks(
    lm: "LlameshLM",
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the scores on the tasks, equal on all processes; rank 0 shows progress.

    All processes call this together.

    Args:
        tasks, folder: As for `task_errors`, which must return no errors.
        num_fewshot: Number of examples before each question; None for each task's default. Tasks
            with a fixed number of 0 are not changed.
        limit: Number of samples per task, the first ones; None for all.

    Returns:
        lm-eval's `results`, with standard errors on rank 0 only, `groups` if any, `versions`,
        `n-shot` and `n-samples`, by task.

    Raises:
        TaskError: The data of a task cannot be loaded, or a task is not supported.
    """
    from lm_eval.evaluator import evaluate

    # lm-eval's worker pool forks, which is unsafe with threads and CUDA.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.ExitStack() as stack:
        if not lm.is_first:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        result = evaluate(
            lm,
            _load(tasks, folder, num_fewshot),
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERS if lm.is_first else 0,
            log_samples=False,
        )
    # Convert numpy numbers to floats for JSON.
    reported = {key: result[key] for key in REPORTED_KEYS if key in result}
    return dict(json.loads(json.dumps(reported, default=float)))


def _load(tasks: Sequence[str], folder: str | None, num_fewshot: int | None) -> Any:
    """Return the tasks with their data for lm-eval's evaluator.

    Raises:
        TaskError: The data cannot be loaded, or a task executes generated code or is multimodal.
    """
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    # The seeds of lm-eval's own command, so that tasks sample the same examples.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = _manager(tasks, folder)
    names = dict.fromkeys(name for task in tasks for name in _match(task, manager))  # no duplicates
    try:
        loaded = manager.load([*names])
    except Exception as error:  # tasks run arbitrary code and access files and the network
        raise TaskError(
            f"tasks={list(tasks)} cannot be loaded ({type(error).__name__}: {error}); check the "
            "task file and its data; data on a hub must be downloaded once"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise TaskError(
                f"task {name} executes generated code or is multimodal, which is not supported; "
                "remove it from tasks"
            )
        # Tasks that set 0 explicitly do not support examples.
        shots = task.get_config("num_fewshot")
        if shots is None or (num_fewshot is not None and shots != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _manager(tasks: Sequence[str], folder: str | None) -> Any:
    """Return lm-eval's task manager, restricted to the folder if it contains all tasks.

    Indexing lm-eval's own tasks takes seconds. A group in the folder may include lm-eval's
    own tasks, so a request for a group always loads the full index.
    """
    if folder is not None:
        local = _index(folder, include_defaults=False)
        if set(tasks) <= set(local.all_subtasks):
            return local
    return _index(folder, include_defaults=True)


@cache
def _index(folder: str | None, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _match(task: str, manager: Any) -> list[str]:
    """Return the task names that an entry of `tasks` matches; empty if unknown."""
    if task.endswith(".yaml") and Path(task).is_file():
        return [task]
    return list(manager.match_tasks([task]))


def _unknown_task(task: str, known: Sequence[str]) -> str:
    similar = difflib.get_close_matches(task, known, n=3)
    remedy = f"use {' or '.join(similar)}" if similar else "use a name from `lm-eval ls tasks`"
    return f"tasks={task} is not a task or group; {remedy}, or set task_folder to your task files"
