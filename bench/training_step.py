"""Our training step beside those of `transformers`' Llama and `litgpt`'s, on the same weights.

    python -m bench.training_step [case … [key=value …]]

Batches, sdpa (causal, no documents), AdamW, its groups and clipping are the same too. Ours is
`train.py`'s step. In bf16 ours has one copy of the weights a step, they autocast, whose residual
stream is float32; in `bf16_true` all is bf16, ours a plain loop. `parallel.host_memory` sets a
whole process's allocator: each has one; `kept` is a peer with that setting too. Words: nothing
written.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from bench.measurement import spread, write
from bench.peers import MODELS, PEERS, Loop, installed, logits_of
from bench.turns import Remote
from cli.arguments import CONF
from cli.config import check_config
from data.dataset import Dataset
from data.loader import StepBatches, TrainLoader
from model.flops import parameter_count
from model.init import initialize
from model.llama import Llama
from parallel.host_memory import keep_freed_memory
from parallel.mesh import MeshShape, Processes
from train import set_up, train_step
from training.config import JobConfig
from training.preflight import prepare_data
from training.resume_policy import Changes
from training.run import Run

AIMS = {"transformers": 1.05, "litgpt": 1.0}
SIZES: dict[str, tuple[str, ...]] = {  # heads of 64
    "12M": (
        *("model.dim=384", "model.n_layers=6", "model.n_heads=6", "model.n_kv_heads=2"),
        "model.ffn_dim=1024",
    ),
    "60M": (
        *("model.dim=640", "model.n_layers=12", "model.n_heads=10", "model.n_kv_heads=5"),
        "model.ffn_dim=1792",
    ),
}
COMMON = (
    *("model.tie_embeddings=false", "model.max_seq_len=512", "train.seq_len=512"),
    *("train.global_batch_size=4", "data.document_mask=false", "optim.lr=3e-4"),
    *("parallel.accelerator=cpu", "log.tensorboard=false", "run.plan_check=off"),
    "validation.samples=0",
)
WARM_UP = 3
ROUNDS = {"12M": 20, "60M": 10}
CASES = ["_".join(parts) for parts in product(SIZES, ("eager", "compiled"), ("fp32", "bf16"))]
MORE_CASES = ["_".join(parts) for parts in product(SIZES, ("eager", "compiled"), ("bf16_true",))]
# Shares of the largest logit, and of the loss, that may differ. In float32 sums are taken in
# another order (measured 1e-6 and 1e-7); in bf16, whose values are up to 0.8% apart, each rounds at
# other places (measured 1e-2 and 7e-5), and without float32 litgpt's loss is itself one of them.
# The weights are compared before, by float32's logits.
LOGITS = {"fp32": 1e-5, "bf16": 3e-2, "bf16_true": 3e-2}
LOSSES = {"fp32": 1e-5, "bf16": 1e-3, "bf16_true": 5e-3}
KEPT = "+kept memory"  # behind the name of a peer that has our allocator setting
REST = 0.05  # seconds between turns: OpenMP's threads spin for some 7 ms before they sleep


@dataclass
class OurRun:
    """`train.py`'s run."""

    run: Run

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, seq) -> (batch, seq, vocab)."""
        return self.run.model(tokens)

    def step(self, batches: StepBatches) -> Tensor:
        """`train.py`'s step."""
        return train_step(self.run, batches, self.run.config.optim.lr)["scalars"][0]


class Contender:
    """One that takes its turns, in a process of its own (`bench.turns`).

    Args:
        name: `ours` or a peer's; with `KEPT` the peer has our allocator setting.
        dtype: `fp32`, `bf16` or `bf16_true`.
        checked: What `check_config` returns.
    """

    def __init__(
        self, name: str, dtype: str, checked: tuple[JobConfig, Processes, MeshShape]
    ) -> None:
        self.name, self.dtype, self.checked = name.removesuffix(KEPT), dtype, checked
        if name == "ours" or name.endswith(KEPT):
            keep_freed_memory()  # as `train.py` does on CPU
        config = checked[0]
        bare = Llama(config.model)
        initialize(bare, config.model, config.run.seed)
        self.model = MODELS[self.name](bare)

    def bare_logits(self, tokens: Tensor) -> Tensor:
        """(batch, seq) -> (batch, seq, vocab) of the float32 model, before `trained` has it."""
        with torch.no_grad():
            return logits_of(self.model, tokens)

    @cached_property
    def trained(self) -> OurRun | Loop:
        """What trains the model."""
        config, processes, mesh = self.checked
        if self.name == "ours" and self.dtype != "bf16_true":
            return OurRun(set_up(config, processes, mesh, prepare_data(config), Changes()))
        compiled = config.parallel.compile
        return Loop.of(self.name, self.model, config.optim, self.dtype, compiled)

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, seq) -> (batch, seq, vocab); compiled code is compared by its losses instead."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return self.trained.logits(tokens)

    def step(self, batches: StepBatches) -> tuple[float, Tensor]:
        """Seconds of a step, and its mean loss."""
        begin = time.perf_counter()
        loss = self.trained.step(batches)
        return time.perf_counter() - begin, loss


def main() -> None:
    """Measures and writes `bench/results/training_step.json`."""
    for name in PEERS.keys() - installed():
        print(f"{name} is not installed, and not measured. To get it: {PEERS[name]}", flush=True)
    overrides = [word for word in sys.argv[1:] if "=" in word]
    words = [word for word in sys.argv[1:] if "=" not in word]
    if unknown := set(words) - {*CASES, *MORE_CASES}:
        sys.exit(f"not a case: {', '.join(unknown)}. Use {', '.join([*CASES, *MORE_CASES])}")
    found = {}
    for case in words or CASES:
        found[case] = measure(case, overrides)
        print("\n".join(table({case: found[case]})), flush=True)
    if words:
        return
    write(Path(__file__).stem, {"peers": installed(), **found})
    print("\n".join(table(found)))
    missed = [
        f"{case}: {name} takes {ratio['median']:.3f} times our time, the aim is {AIMS[name]}"
        for case, figures in found.items()
        for name, ratio in figures["ratio"].items()
        if ratio["median"] < AIMS[name]
    ]
    assert not missed, "\n".join(missed)


def measure(case: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Seconds a step of each, who take turns in rotating order, and the ratios round by round."""
    size, mode, dtype = case.split("_", 2)
    names = ["ours", *(peer + kept for peer in installed() for kept in ("", KEPT))]
    with tempfile.TemporaryDirectory() as run, ExitStack() as stack:
        words = [*SIZES[size], *COMMON, f"run.dir={run}", *overrides]
        words.append(f"precision.param={dtype.partition('_')[0]}")
        words.append(f"parallel.compile={str(mode == 'compiled').lower()}")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            checked = check_config(compose("train", words))
        batches = first_batches(checked[0], WARM_UP + ROUNDS[size])
        tokens = batches[0].micro_batches[0].tokens
        contenders = {
            name: stack.enter_context(closing(Remote(name, Contender, name, dtype, checked)))
            for name in names
        }
        for method, tolerance in (("bare_logits", LOGITS["fp32"]), ("logits", LOGITS[dtype])):
            logits = {name: each.ask(method, tokens) for name, each in contenders.items()}
            compare(logits, tolerance)
        seconds = race(contenders, batches, LOSSES[dtype])
    ratios = {
        name: spread([a / b for a, b in zip(taken, seconds["ours"], strict=True)])
        for name, taken in seconds.items()
    }
    return {
        "parameters": parameter_count(checked[0].model),
        "tokens": tokens.numel(),
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "ratio": {peer: ratios[peer] for peer in installed()},
        "ratio_kept": {peer: ratios[peer + KEPT] for peer in installed()},
    }


def first_batches(config: JobConfig, count: int) -> list[StepBatches]:
    """Those that a run of this configuration begins with."""
    dataset = prepare_data(config)
    assert isinstance(dataset, Dataset), "the bench reads prepared data"
    loader = TrainLoader(dataset, config.stages(), seed=config.run.seed, rank=0, size=1)
    return [loader.step(number) for number in range(count)]


def race(
    contenders: dict[str, Remote], batches: Sequence[StepBatches], tolerance: float
) -> dict[str, list[float]]:
    """Seconds of each one's steps after the warm-up, in which the losses are compared."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number, batch in enumerate(batches):
        first = number % len(names)
        losses = {}
        for name in names[first:] + names[:first]:
            taken, losses[name] = contenders[name].ask("step", batch)
            if number >= WARM_UP:
                seconds[name].append(taken)
            time.sleep(REST)
        if number < WARM_UP:
            compare(losses, tolerance)
    return seconds


def compare(results: dict[str, Tensor], tolerance: float) -> None:
    """Raises AssertionError where a peer's result is not ours, by a share of our largest value."""
    ours = results["ours"].double()
    for name, theirs in results.items():
        off = ((theirs.double() - ours).abs().max() / ours.abs().max()).item()
        assert off <= tolerance, f"{name}'s result differs from ours by {off:.2g} of the largest"


def table(found: dict[str, Any]) -> list[str]:
    """A line a case: median milliseconds, how many times ours each peer's are, and when kept."""
    lines = []
    for case, figures in found.items():
        ours = figures["seconds"]["ours"]["median"]
        line = f"{case:<20} ours {1e3 * ours:7.1f} ms"
        for name, ratio in figures["ratio"].items():
            median, kept = figures["seconds"][name]["median"], figures["ratio_kept"][name]
            line += f"   {name} {1e3 * median:7.1f} ms, {times(ratio)}, kept {times(kept)}"
        lines.append(line)
    return lines


def times(ratio: dict[str, float]) -> str:
    """A ratio's median and quartiles."""
    return f"{ratio['median']:.3f} times ({ratio['quartile_1']:.3f}, {ratio['quartile_3']:.3f})"


if __name__ == "__main__":
    main()
