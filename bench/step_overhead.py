"""Framework overhead: a step of `train.py` compared with a plain PyTorch loop.

    python -m bench.step_overhead [key=value …]

Same default model, batches, fused AdamW and clipping in one process. Steps alternate and ratios are
computed per pair, so that variations of the machine's speed cancel out. Target: a median ratio of
at most 1.03.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from bench.measurement import spread, write
from cli.arguments import CONF
from cli.config import check_config
from data.loader import StepBatches
from model.init import initialize
from model.llama import Llama
from train import set_up, train_step
from training.optimizer import build_optimizer
from training.preflight import prepare_data
from training.resume_policy import Changes
from training.run import Run

WARM_UP, PAIRS = 5, 60


def main() -> None:
    """Run the benchmark and write `bench/results/step_overhead.json`."""
    with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as run:
        overrides = [f"run.dir={run}", "parallel.accelerator=cpu", "log.tensorboard=false"]
        config, processes, mesh = check_config(compose("train", [*overrides, *sys.argv[1:]]))
        dataset = prepare_data(config)
        ours = set_up(config, processes, mesh, dataset, Changes())
        bare = Llama(config.model)
        initialize(bare, config.model, config.run.seed)
        optimizer = torch.optim.AdamW(build_optimizer(bare, config.optim).param_groups)
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        for step, batches in zip(range(WARM_UP + PAIRS), ours.batches(), strict=False):
            turns = [
                ("ours", lambda: our_step(ours, batches)),  # noqa: B023
                ("bare", lambda: bare_step(bare, optimizer, batches)),  # noqa: B023
            ]
            losses = {}
            for name, take_step in turns if step % 2 else turns[::-1]:
                start = time.perf_counter()
                losses[name] = take_step()
                if step >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
            if step == 0:
                torch.testing.assert_close(losses["ours"], losses["bare"])
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["bare"], strict=True)]
    write(
        Path(__file__).stem,
        {
            "ours_seconds": spread(seconds["ours"]),
            "bare_seconds": spread(seconds["bare"]),
            "ratio": spread(ratios),
        },
    )


def our_step(run: Run, batches: StepBatches) -> torch.Tensor:
    """Run a step of `train.py`; return the mean loss in float32."""
    return train_step(run, batches, run.config.optim.lr)["scalars"][0].float()


def bare_step(model: Llama, optimizer: torch.optim.Optimizer, batches: StepBatches) -> torch.Tensor:
    """Run the same step with plain PyTorch; return the mean loss."""
    loss = torch.zeros(())
    for tokens, positions, labels in batches.micro_batches:
        micro_loss = model(tokens, positions, labels) / batches.n_targets
        micro_loss.backward()
        loss += micro_loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


if __name__ == "__main__":
    main()
