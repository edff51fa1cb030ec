"""What `generate.py` has around the model: prompts and the rules about them, the mesh, figures."""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.config import GenerateJobConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.mesh import MeshShape, Processes, plan_processes, resolve_mesh
from resilience.exit_codes import ExitCode
from training.config_rules import model_errors
from training.config_validation import ConfigError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from data.tokenizer import Tokenizer
    from evaluation.generation import Completion
    from evaluation.inference import InferenceContext

TOLD = 10  # bad lines of a file of prompts, after which the others are counted


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The beginning of a text, as a person gave it and as tokens."""

    text: str
    ids: list[int]


# ---------------------------------------------------------------- before anything is launched


def check_mesh(
    config: GenerateJobConfig, model: ModelConfig
) -> tuple[ParallelConfig, Processes, MeshShape]:
    """How the model is spread; raises `ConfigError` with every problem."""
    # A step has one column, which nobody can cut along seq.
    parallel = dataclasses.replace(config.parallel, sequence_parallel=False, loss_parallel=False)
    problems = [
        f"parallel.{axis} ({size}) has no use for one batch of prompts: use parallel.{axis}=1; "
        "parallel.tp is what spreads a model"
        for axis in ("dp_replicate", "dp_shard", "cp")
        if (size := getattr(parallel, axis)) != 1
    ]
    processes, more = plan_processes(parallel)
    mesh, of_mesh = resolve_mesh(parallel, processes.world_size)
    if not problems:
        problems = more + (of_mesh or model_errors(mesh, parallel, model, model.max_seq_len))
    if problems:
        raise ConfigError(problems)
    return parallel, processes, mesh


def read_prompts(
    config: GenerateJobConfig, tokenizer: "Tokenizer", model: ModelConfig
) -> list[Prompt] | None:
    """The prompts of the command or of the file that it names; None where it gives neither.

    Raises:
        ConfigError: with every prompt that cannot be completed.
    """
    if config.prompt is not None:
        named = [("prompt", config.prompt)]
    elif config.prompts is not None:
        named = _lines(Path(config.prompts))
    else:
        return None
    prompts, problems = [], []
    for name, text in named:
        prompt = encode(text, tokenizer)
        if problem := problem_of(prompt, model):
            problems.append(f"{name} {problem}")
        prompts.append(prompt)
    if len(problems) > TOLD:
        problems[TOLD:] = [f"and {len(problems) - TOLD} more prompts of {config.prompts}"]
    if problems:
        raise ConfigError(problems)
    return prompts


def encode(text: str, tokenizer: "Tokenizer") -> Prompt:
    """A prompt as a model of documents takes it: a text that begins."""
    return Prompt(text, [tokenizer.bos_id, *tokenizer.encode(text)])


def problem_of(prompt: Prompt, model: ModelConfig) -> str | None:
    """Why a prompt cannot be completed."""
    if not prompt.text:
        return "is empty: give the beginning of a text"
    try:
        prompt.text.encode()
    except UnicodeEncodeError:
        return "is not a text: it holds half a character, or bytes that are not UTF-8"
    over = len(prompt.ids) - model.max_seq_len
    if over > 0:
        return (
            f"has {len(prompt.ids):,} tokens, {over:,} more than the model's context (max_seq_len) "
            f"of {model.max_seq_len:,}: shorten it"
        )
    return None


def _lines(path: Path) -> list[tuple[str, str]]:
    """The prompts of a file, each with its name: one a line, or in a .jsonl one object a line."""
    try:
        content = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            [f"prompts ({path}) cannot be read ({told}): name a text file in UTF-8"]
        ) from None
    lines = content.removesuffix("\n").split("\n") if content.strip() else []
    if not lines:
        raise ConfigError([f"prompts ({path}) holds no prompt: write one a line"])
    named = [(f"prompts ({path}) line {n}", text) for n, text in enumerate(lines, start=1)]
    if path.suffix != ".jsonl":
        return [(name, text.removesuffix("\r")) for name, text in named]
    found, problems = [], []
    for name, line in named:
        try:
            text = json.loads(line)["prompt"]
            assert isinstance(text, str)
        except (ValueError, TypeError, KeyError, AssertionError):
            problems.append(f'{name} is not an object with a text as "prompt": {line[:80]}')
        else:
            found.append((name, text))
    if problems:
        raise ConfigError(problems[:TOLD])
    return found


# ---------------------------------------------------------------- while the processes run


def typed_prompts(fabric: "Fabric", tokenizer: "Tokenizer", model: ModelConfig) -> Iterator[Prompt]:
    """Each line that the first process reads, on every process; an empty one is no prompt."""
    import torch.distributed as dist

    # A group of its own, since nobody knows how long a person thinks.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    while True:
        told: list[Any] = [_typed(tokenizer, model) if fabric.is_global_zero else None]
        dist.broadcast_object_list(told, group=group)
        if told[0] is None:
            return
        yield told[0]


def _typed(tokenizer: "Tokenizer", model: ModelConfig) -> Prompt | None:
    """The next line that can be completed; None where the input ends."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            if sys.stdin.isatty():
                print(file=sys.stderr)  # after the `> `
            return None
        prompt = encode(line.decode(errors="surrogateescape").rstrip("\r\n"), tokenizer)
        problem = problem_of(prompt, model)
        if problem is None:
            return prompt
        if prompt.text:
            print(f"The prompt {problem}", file=sys.stderr, flush=True)


@contextmanager
def ending_early(loaded: "InferenceContext") -> Iterator[None]:
    """Ends the program where a person stops it or reads no further; the first process decides."""
    if not loaded.fabric.is_global_zero:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child ends with the main process
    try:
        yield
    except KeyboardInterrupt:
        code = int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except Exception as error:
        loaded.watchdog.wait_for_abort(error)
        raise
    else:
        return
    os._exit(code)  # peers may wait for us in a collective call


class Completer:
    """Completes batches of prompts on every process, and adds up how fast.

    The time of a batch's first tokens is that of its prompts; what comes after is generation.
    """

    def __init__(
        self, config: GenerateJobConfig, loaded: "InferenceContext", tokenizer: "Tokenizer"
    ) -> None:
        from evaluation.generation import Sampling
        from evaluation.generation_sync import GenerationSync
        from formats.tokenizers import stop_ids

        self.config, self.loaded = config, loaded
        self.tells = loaded.fabric.is_global_zero  # and the other processes say nothing
        self.sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
        self.stop = stop_ids(tokenizer)
        mesh = loaded.strategy.device_mesh
        self.agree = GenerationSync(mesh, loaded.fabric.device)
        self.prompts = 0
        self.prompt_tokens, self.prompt_seconds = 0, 0.0
        self.new_tokens, self.later_tokens, self.later_seconds = 0, 0, 0.0
        self.cut = 0  # texts that the context ended

    def __call__(
        self, prompts: list[Prompt], on_token: Callable[[int], None] | None = None
    ) -> "list[Completion]":
        """One batch; `on_token` hears each token as it comes, of whichever row."""
        from evaluation.generation import generate

        begin = time.perf_counter()
        first: list[float] = []

        def heard(_: int, token: int) -> None:
            if not first:
                first.append(time.perf_counter())
            if on_token is not None:
                on_token(token)

        found = generate(
            self.loaded.model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=self.config.max_new_tokens,
            sampling=self.sampling,
            stop=self.stop,
            device=self.loaded.fabric.device,
            agree=self.agree,
            on_token=heard,
            first_prompt=self.prompts,
        )
        end = time.perf_counter()
        counts = [len(each.tokens) for each in found]
        self.prompts += len(prompts)
        self.prompt_tokens += sum(len(prompt.ids) for prompt in prompts)
        self.prompt_seconds += (first or [end])[0] - begin
        self.new_tokens += sum(counts)
        self.later_tokens += sum(count - 1 for count in counts if count)
        self.later_seconds += end - (first or [end])[0]
        self.cut += sum(
            not each.stopped and count < self.config.max_new_tokens
            for each, count in zip(found, counts, strict=True)
        )
        return found

    def figures(self) -> list[str]:
        """What a person is told at the end, a line each."""
        if not self.prompts:
            return []
        speed = f"{self.prompt_tokens / self.prompt_seconds:,.1f} tokens/s"
        lines = [f"prompts: {self.prompt_tokens:,} tokens, {speed}"]
        generated = f"generated: {self.new_tokens:,} tokens"
        if self.later_tokens:
            generated += f", {self.later_tokens / self.later_seconds:,.1f} tokens/s"
        lines.append(generated)
        if self.cut:
            lines.append(
                f"{self.cut} of {self.prompts} texts ended with the model's context (max_seq_len) "
                f"of {self.loaded.weights.model.max_seq_len:,} tokens"
            )
        return lines
