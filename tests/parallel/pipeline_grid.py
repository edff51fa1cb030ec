"""Every pipeline of up to eight processes: alone, and with the other axes, with drawn options.

`combinations` generates the grid from the axes and options of `ParallelConfig`. Each combination is
either rejected by the rules of the configuration (`errors_of`) or trained and compared with one
process (`differences`). `bench.pipeline_grid` runs all of them.
"""

import itertools
import random
from dataclasses import replace
from functools import cache
from typing import Any

import small_run
import torch
from distributed import on_ranks
from small_run import (
    OPTIM,
    SEED,
    SEQ,
    Case,
    GlobalBatch,
    build,
    local_batches,
    model_config,
    of_all_stages,
)
from torch import Tensor

from data.config import DataConfig, SourceConfig
from model.init import initialize
from model.llama import Llama
from model.loss import IGNORE
from parallel.config import PrecisionConfig
from train import train_step
from training.config import TrainConfig
from training.config_rules import mesh_errors
from training.optimizer import build_optimizer

STEPS = 20
BATCH = 2 * small_run.BATCH  # divides into 4 micro-batches on 2 data ranks
LR = 2e-3  # with 1e-2 the norm doubles in some steps, and rounding errors grow with it
MAX_PROCESSES = 8
AXES: dict[str, tuple[Any, ...]] = {
    "pp": (2, 3, 4),
    "pp_parts": (1, 2),
    "dp_replicate": (1, 2),
    "dp": (1, 2),
    "cp": (1, 2),
    "tp": (1, 2),
    "tied": (False, True),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "n_layers": (2, 3, 5, 7, 8),
    "n_micro": (1, 2, 3, 4, 6),
    "reshard_after_forward": (None, True, False),
    "reduce_gradients": ("step", "micro_batch"),
    "activation_checkpoint": ("none", "selective", "full"),
    "sequence_parallel": (True, False),
    "loss_parallel": (True, False),
}
DATA = DataConfig("grid", "unused", {"text": SourceConfig("stdlib")})


def combinations(seed: int) -> list[Case]:
    """Return each combination of the axes, with options that are drawn until they are valid.

    The rejected ones are included: the last draw for a combination of the axes is valid.
    """
    generator = random.Random(seed)
    found = []
    for values in itertools.product(*AXES.values()):
        axes = Case(**dict(zip(AXES, values, strict=True)))
        if axes.world > MAX_PROCESSES:
            continue
        for _ in range(1000):
            drawn = {name: generator.choice(each) for name, each in OPTIONS.items()}
            found.append(replace(axes, **drawn))
            if not errors_of(found[-1]):
                break
        else:
            raise ValueError(f"no options are valid for {axes}")
    return found


def batch(step: int) -> GlobalBatch:
    """Return packed documents, with as many sequences as `BATCH`."""
    halves = small_run.batch(step), small_run.batch(step + STEPS)
    tokens, positions, labels = (torch.cat(fields) for fields in zip(*halves, strict=True))
    return tokens, positions, labels


def errors_of(case: Case) -> list[str]:
    """Return the errors of the configuration of a combination."""
    rows, rest = divmod(BATCH, case.mesh.dp * case.n_micro)
    if rest:
        return [f"{BATCH} sequences do not divide into {case.n_micro} micro-batches per data rank"]
    train = TrainConfig(STEPS, BATCH, SEQ, micro_batch_size=rows)
    model = model_config(case.tied, case.n_layers)
    return list(mesh_errors(case.mesh, case.parallel, PrecisionConfig(), model, train, DATA))


def differences(case: Case) -> dict[str, float]:
    """Return the largest relative differences from one process, and those of the ranks.

    Initial weights are compared bit for bit, and the ranks' statistics with each other.
    """
    ranks = on_ranks(case.world, _train, case)
    expected_weights, expected = _reference(case.tied, case.n_layers)
    found, weights = ranks[0]
    equal = all(torch.equal(weights[name], weight) for name, weight in expected_weights.items())
    if not equal or weights.keys() != expected_weights.keys():
        raise ValueError(f"{case}: initial weights differ from those of one process")
    if any(stats != found for stats, _ in ranks):
        raise ValueError(f"{case}: the ranks have different statistics")
    return {
        key: max(abs(a[index] / b[index] - 1) for a, b in zip(found, expected, strict=True))
        for index, key in enumerate(("loss", "grad_norm"))
    }


def _train(case: Case) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Return loss and norm of each step, and the initial weights."""
    run: Any = build(case)
    initial = of_all_stages(run.llama.named_parameters())
    stats = []
    for step in range(STEPS):
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        loss, norm, *_ = train_step(run, batches, LR)["scalars"].tolist()
        stats.append((loss, norm))
    return stats, initial


@cache
def _reference(tied: bool, n_layers: int) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    """Return initial weights, and loss and norm of each step on the unsharded model."""
    config = model_config(tied, n_layers)
    model = Llama(config)
    initialize(model, config, SEED)
    initial = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    adamw, stats = build_optimizer(model, OPTIM), []
    for group in adamw.param_groups:
        group["lr"] = LR
    for step in range(STEPS):
        tokens, positions, labels = batch(step)
        loss = model(tokens, positions, labels) / (labels != IGNORE).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), Case().max_norm)
        adamw.step()
        adamw.zero_grad()
        stats.append((loss.item(), norm.item()))
    return initial, stats
