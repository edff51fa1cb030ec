"""Parts that launch `train.py` or `pytest`, as users do, and compare the files of the runs."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.parts import Rows

ROOT = Path(__file__).parents[2]
STEPS = 8
MODEL = (
    *("data=mock", "tokenizer=byte", "model.name=check", "model.dim=256", "model.n_layers=2"),
    *("model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=512", "model.vocab_size=512"),
    *("model.max_seq_len=512", "train.seq_len=512", "train.global_batch_size=8"),
    *("train.micro_batch_size=4", "optim.lr=1e-3", "optim.warmup_steps=2", "log.interval=1"),
    *("validation.samples=0", "log.tensorboard=false"),
)
REDUCED = (
    *("model.dim=64", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=64"),
    *("train.seq_len=32", "model.n_layers=1"),
)
# For the duration of a save: about 300M parameters, 3.6 GB with their moments.
SAVED = (
    *("model.dim=1024", "model.n_layers=16", "model.n_heads=16", "model.n_kv_heads=8"),
    *("model.ffn_dim=4096", "model.vocab_size=32768", "train.seq_len=512"),
)
FP32 = ("precision.param=fp32", "precision.float32_matmul=highest")
BF16 = ("precision.param=bf16",)
EAGER = ("parallel.compile=false",)  # the default compiles on GPUs
Overrides = Sequence[str]


# ---------------------------------------------------------------- losses


def losses(reduced: bool) -> Rows:
    """Yield the losses of one process in fp32, bf16, fp8 and int8 against fp32 on CPU.

    In fp32, sums in another order differ by 1e-6 relative, and steps amplify it. bf16 rounds each
    weight and activation by up to 2**-9, so that the loss of about 6 differs by a few thousandths.
    """
    device = "cpu" if reduced else "cuda"
    runs: dict[str, Overrides] = {
        "cpu": (*FP32, "parallel.accelerator=cpu"),
        "fp32": (*FP32, *EAGER),
        "bf16": (*BF16, *EAGER),
        "bf16 compiled": (*BF16, "parallel.compile=true"),
        "bf16 moments": (*BF16, *EAGER, "precision.optimizer_state=bf16"),
        "int8 moments": (*BF16, *EAGER, "precision.optimizer_state=int8"),
        "fp8 rowwise": (*BF16, "precision.fp8=rowwise", "parallel.compile=true"),
        "fp8 tensorwise": (*BF16, "precision.fp8=tensorwise", "parallel.compile=true"),
    }
    limits = {"fp32": 1e-4, "fp8 rowwise": 3e-2, "fp8 tensorwise": 3e-2}
    if reduced:
        runs = {name: runs[name] for name in ("cpu", "fp32", "bf16", "int8 moments")}
    with tempfile.TemporaryDirectory() as folder:
        expected: Any = None
        names = list(runs)
        for start in range(0, len(names), 2):  # more at once compete for the CPUs that compile
            pair = {name: runs[name] for name in names[start : start + 2]}
            found = train(Path(folder), device, pair, reduced)
            expected = found.pop("cpu", expected)
            if isinstance(expected, str):
                raise RuntimeError(expected)
            for name, metrics in found.items():
                yield name, compare_losses(metrics, expected, limits.get(name, 1e-2), reduced)


def compare_losses(metrics: Any, expected: Any, limit: float, reduced: bool) -> dict[str, Any]:
    """Compare the losses of a run with those expected, and return a row of the report."""
    if isinstance(metrics, str):
        return {"passed": False, "error": metrics}
    pairs = zip(metrics, expected, strict=True)
    difference = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    fell = metrics[0]["loss"] - metrics[-1]["loss"]
    return {
        "passed": difference < limit and (reduced or fell > 0.05),
        "largest_difference": difference,
        "limit": limit,
        "loss_fell_by": fell,
        "compiled_graphs": metrics[-1].get("compiled_graphs"),
    }


def deterministic(reduced: bool) -> Rows:
    """Yield whether two runs with `train.deterministic=true` have equal metrics and checkpoints."""
    device = "cpu" if reduced else "cuda"
    given = (*BF16, "train.deterministic=true", "data.document_mask=true")
    kinds: dict[str, Overrides] = {"eager": EAGER, "compiled": ("parallel.compile=true",)}
    if reduced:
        del kinds["compiled"]
    with tempfile.TemporaryDirectory() as folder:
        for kind, more in kinds.items():
            runs = {f"{kind} {n}": (*given, *more) for n in (1, 2)}
            found = train(Path(folder), device, runs, reduced)
            first, second = (found[f"{kind} {n}"] for n in (1, 2))
            if errors := [each for each in (first, second) if isinstance(each, str)]:
                yield kind, {"passed": False, "error": errors}
                continue
            keys = ("loss", "grad_norm", "batch_hash")
            metrics = [[[line[key] for key in keys] for line in run] for run in (first, second)]
            files = [tensor_hashes(Path(folder, f"{kind} {n}")) for n in (1, 2)]
            equal = {"metrics": metrics[0] == metrics[1], "checkpoint": files[0] == files[1]}
            yield kind, {"passed": all(equal.values()), **equal, "steps": len(first)}


def tensor_hashes(run: Path) -> dict[str, str]:
    """Return the hashes of the tensors' files in the last checkpoint of a run."""
    (folder,) = (run / "checkpoints").glob(f"step-*{STEPS}")
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        name: json.dumps(entry)
        for name, entry in manifest["files"].items()
        if name.endswith(".distcp")
    }


def two_ranks(reduced: bool) -> Rows:
    """Yield the losses of two ranks over NCCL against one process, where two GPUs are visible."""
    import torch

    if not reduced and torch.cuda.device_count() < 2:
        yield "nccl", {"skipped": f"{torch.cuda.device_count()} GPU is visible; needs 2"}
        return
    device = "cpu" if reduced else "cuda"
    alone = ("parallel.devices=1",)
    runs: dict[str, Overrides] = {
        "one": alone,
        "dp_shard=2": ("parallel.devices=2", "parallel.dp_shard=2"),
        "tp=2": ("parallel.devices=2", "parallel.tp=2"),
        "cp=2": ("parallel.devices=2", "parallel.cp=2"),
    }
    if reduced:
        del runs["cp=2"], runs["dp_shard=2"]
    with tempfile.TemporaryDirectory() as folder:
        given = {name: (*FP32, *more) for name, more in runs.items()}
        found: dict[str, Any] = {}
        for name in given:  # one after the other, as they share the GPUs
            found |= train(Path(folder), device, {name: given[name]}, reduced)
            if name == "one":
                continue
            pair = [found["one"], found[name]]
            if errors := [each for each in pair if isinstance(each, str)]:
                yield name, {"passed": False, "error": errors}
                continue
            difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(*pair, strict=True))
            yield name, {"passed": difference < 1e-4, "largest_difference": difference}


# ---------------------------------------------------------------- saving


def save_stall(reduced: bool) -> Rows:
    """Yield how long asynchronous saves block training, and the steps next to those without one.

    Both must be a small fraction of the time that the save takes in the background.
    """
    device = "cpu" if reduced else "cuda"
    steps = STEPS if reduced else 40
    given = (*BF16, "checkpoint.interval=4", f"train.max_steps={steps}", "checkpoint.keep_last=1")
    more = () if reduced else (*SAVED, "checkpoint.interval=10")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        (metrics,) = train(Path(folder), device, {"run": (*given, *more)}, reduced).values()
        if isinstance(metrics, str):
            raise RuntimeError(metrics)
        lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
        saves = [line for line in lines if line["event"] == "save"]
    background = saves[:-1]  # the last one is waited for
    stalls = [line["seconds"] for line in background]
    writes = [line["write_seconds"] for line in background]
    during = {line["step"] + 1 for line in background}
    seconds = {
        name: sorted(m["step_seconds"] for m in metrics[2:] if (m["step"] in during) == saving)
        for name, saving in (("while_saving", True), ("otherwise", False))
    }
    medians = {name: values[len(values) // 2] for name, values in seconds.items()}
    stalled = max(stalls)
    yield (
        "asynchronous save",
        {
            "passed": reduced or stalled < 0.25 * max(writes),
            "gigabytes": saves[0]["bytes"] / 1e9,
            "stall_seconds": stalls,
            "write_seconds": writes,
            "step_seconds": medians,
        },
    )


# ---------------------------------------------------------------- tests


def pytest_on_gpu(reduced: bool) -> Rows:
    """Yield the summary of `pytest -m gpu` over the files that have such tests."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in path.read_text()
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "-rfE"]
    if reduced:
        command, files = [*command, "--collect-only"], files[:1]
    done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    passed = done.returncode == 0
    summary = lines[-1] if lines else done.stderr[-500:]
    yield "pytest -m gpu", {"passed": passed, "summary": summary, "failures": failures}


# ---------------------------------------------------------------- launching


def train(
    folder: Path, device: str, runs: Mapping[str, Overrides], reduced: bool
) -> dict[str, Any]:
    """Run `train.py` once for each entry, at the same time.

    Returns:
        The lines of metrics.jsonl of each run, or the end of its output if it failed.
    """
    processes = {}
    for name, overrides in runs.items():
        (folder / name).mkdir(parents=True)
        words = [
            *(*MODEL, *(REDUCED if reduced else ()), f"train.max_steps={STEPS}"),
            *("checkpoint.interval=null", "parallel.compile=false", "parallel.devices=1"),
            *(f"parallel.accelerator={device}", f"run.dir={folder / name}", *overrides),
        ]
        last = {word.partition("=")[0]: word for word in words}  # Hydra rejects repeated keys
        log = (folder / f"{name}.log").open("wb")
        processes[name] = subprocess.Popen(
            [sys.executable, "train.py", *last.values()],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ({"OMP_NUM_THREADS": "1"} if reduced else {}),
        )
    found: dict[str, Any] = {}
    for name, process in processes.items():
        code = process.wait()
        output = (folder / f"{name}.log").read_text(errors="replace")
        metrics = folder / name / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if not code else []
        finite = lines and all(math.isfinite(line["loss"]) for line in lines)
        found[name] = lines if finite else f"{name}: exit code {code}\n{output[-1500:]}"
        if not finite:
            print(f"{name}:\n{output}", flush=True)
            shutil.rmtree(folder / name)
    return found
