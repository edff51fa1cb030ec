"""Run benchmarks with lm-eval (extra `lm-eval`): its own tasks and the user's task files.

lm-eval provides tasks, prompts and metrics; `evaluation.lm_eval_model` computes the answers. The
package is imported only when tasks are configured.
"""

import contextlib
import difflib
import importlib.util
import io
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import strict_json
from evaluation.errors import EvaluationError, TaskError
from evaluation.third_party import third_party_imports
from formats.weights import all_gather

if TYPE_CHECKING:
    from evaluation.lm_eval_model import LlameshLM

BOOTSTRAP_ITERS = 1000
"""Resamples for standard errors without a closed form; accurate to about 2%."""

LM_EVAL_ERRORS = {
    "KeyError: None": "check metric_list of the task file: a metric is not known, or it is a "
    "function without aggregation and higher_is_better",
    "IndexError: string index out of range": "the first document has an empty choice or answer: "
    "remove it, or check doc_to_choice and doc_to_target",
}
"""Errors of lm-eval that do not name the cause, and what to check."""

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
        with third_party_imports():
            manager = _manager(tasks, folder)
        unknown = [task for task in tasks if not _match(task, manager)]
        yield from (_unknown_task(task, manager.all_tasks, folder) for task in unknown)


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are run.

    Attributes:
        folder: As for `task_errors`.
        num_fewshot: Number of examples before each question; None for each task's default. Tasks
            with a fixed number of 0 are not changed.
        limit: Number of samples per task, the first ones; None for all.
        chat: Whether prompts are messages of the model's chat template.
        samples: Whether to return the samples.
    """

    folder: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    samples: bool = False


@dataclass
class TaskResults:
    """Results of the tasks, equal on all processes.

    Attributes:
        scores: lm-eval's `results`, with standard errors on rank 0 only, `groups` if any,
            `versions`, `n-shot` and `n-samples`, by task.
        errors: Why a task or group has no results, by its name.
        samples: Documents, prompts, answers and metrics of each task, if requested.
    """

    scores: dict[str, Any]
    errors: dict[str, str]
    samples: dict[str, list[Any]]


def run_tasks(lm: "LlameshLM", tasks: Sequence[str], options: TaskOptions) -> TaskResults:
    """Run the tasks one by one on all processes together; rank 0 shows progress.

    An error in the code or the data of a task leaves the results of the others. Errors of the
    processes, such as an out-of-memory error or a dead rank, are raised.

    Args:
        tasks: As for `task_errors`, which must return no errors.
    """
    # lm-eval's worker pool forks, which is unsafe with threads and CUDA.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with contextlib.ExitStack() as stack:
        stack.enter_context(third_party_imports())
        if not lm.is_first:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        from lm_eval.evaluator_utils import EvalAcc, aggregate_groups

        loaded, groups, errors = _load(tasks, options)
        found, samples = EvalAcc(), dict[str, list[Any]]()
        for name, task in loaded.items():
            result, error = _run_task(lm, name, task, options)
            if result is None:
                errors[name] = error
                continue
            found.metrics |= result["results"]
            found.configs |= result["configs"]
            found.versions |= result["versions"]
            found.num_fewshot |= result["n-shot"]
            found.higher_is_better |= result["higher_is_better"]
            found.n_samples |= result["n-samples"]
            samples |= result.get("samples", {})
        for name, group in groups.items():
            leaves = [task.task_name for task in group.get_all_tasks()]
            absent = [leaf for leaf in leaves if leaf not in found.metrics]
            if absent:
                errors[name] = f"{', '.join(absent[:8])} of this group has no results"
            else:
                found.groups[name] = group
        result = dict(aggregate_groups(found)._to_eval_results())
    scores = {key: result[key] for key in REPORTED_KEYS if key in result}
    for name, values in scores["results"].items():
        if bad := [key for key, value in values.items() if _is_nan(key, value)]:
            errors[name] = f"{', '.join(bad)} is NaN; check the metric and the task's data"
    # Convert numpy numbers to floats for JSON.
    return TaskResults(json.loads(strict_json(scores, default=float)), errors, samples)


def _run_task(lm: "LlameshLM", name: str, task: Any, options: TaskOptions) -> tuple[Any, str]:
    """Return lm-eval's result of one task, or None and the error, on all processes."""
    from lm_eval.evaluator import evaluate

    result, error = None, None
    try:
        result = evaluate(
            lm,
            {"tasks": {name: task}, "groups": {}},
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_ITERS if lm.is_first else 0,
            log_samples=options.samples,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
        )
    except Exception as caught:
        if lm.is_computing and not isinstance(caught, EvaluationError):
            raise  # of this process alone: the others wait in a collective
        error = _described(caught)
    # A standard error is computed on rank 0 only, and may fail there.
    errors = [each for each in all_gather(error) if each is not None]
    return (None, errors[0]) if errors else (result, "")


def _is_nan(key: str, value: Any) -> bool:
    """Return whether a metric is NaN; standard errors of few samples may be."""
    return isinstance(value, float) and math.isnan(value) and "_stderr" not in key


def _described(error: Exception) -> str:
    """Return a task's error with its remedy."""
    if isinstance(error, EvaluationError):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; install the package that the task needs (pip install {error.name})"
    if hint := LM_EVAL_ERRORS.get(text):
        return f"{text} in lm-eval; {hint}, or remove the task"
    if isinstance(error, OSError) or type(error).__module__.startswith(
        ("datasets.", "hugg", "req")
    ):
        return f"{text}; check the task's data; data on a hub must be downloaded once"
    return f"{text}; check the task file and its data, or remove the task"


def _load(
    tasks: Sequence[str], options: TaskOptions
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return the tasks with their data, the groups, and the errors, each by name."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    manager = _manager(tasks, options.folder)
    names = dict.fromkeys(name for task in tasks for name in _match(task, manager))  # no duplicates
    loaded, groups, errors = dict[str, Any](), dict[str, Any](), dict[str, str]()
    for name in names:
        # The seeds of lm-eval's own command, so that tasks sample the same examples.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        found, error = dict[str, Any](), None
        try:
            found = manager.load([name])
            for each, task in found["tasks"].items():
                _configure(each, task, options.num_fewshot)
        except Exception as caught:  # tasks run arbitrary code and access files and the network
            error = f"cannot be loaded: {_described(caught)}"
        # A rank that cannot load a task must not leave the others to it.
        if failures := [each for each in all_gather(error) if each is not None]:
            errors[name] = failures[0]
            continue
        loaded |= {each: task for each, task in found["tasks"].items() if each not in loaded}
        groups |= found.get("groups", {})
    return loaded, groups, errors


def _configure(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the number and the seed of a task's examples; reject tasks that are not supported."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

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


def _unknown_task(task: str, known: Sequence[str], folder: str | None) -> str:
    if folder and (file := next(Path(folder).rglob(f"{task}.yaml"), None)):
        return f"tasks={task} is not defined by {file}; correct its YAML and its key task or group"
    similar = difflib.get_close_matches(task, known, n=3)
    remedy = f"use {' or '.join(similar)}" if similar else "use a name from `lm-eval ls tasks`"
    return f"tasks={task} is not a task or group; {remedy}, or set task_folder to your task files"
