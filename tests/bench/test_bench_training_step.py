"""bench.training_step: equality of the baselines with our model, and a small run."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import start_python

from bench.baselines import BASELINES, LOSSES, MODELS, logits_of
from bench.remote import Remote
from bench.training_step import WITH_ALLOCATOR, Implementation
from model.config import ModelConfig
from model.llama import Llama

TINY = ModelConfig("tiny", 64, 2, 4, 2, 96, 97, max_seq_len=48)
SMALL = (
    *("model.dim=64", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=2"),
    *("model.ffn_dim=64", "train.seq_len=64", "tokenizer=byte"),
)
BENCH = ("-m", "bench.training_step", "12M_eager_bf16", *SMALL)


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_has_our_logits_and_loss(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {BASELINES[name]}")
    generator = torch.Generator().manual_seed(0)
    ours = Llama(TINY)
    with torch.no_grad():
        for parameter in ours.parameters():  # large enough that attention is far from uniform
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    theirs = MODELS[name](ours)
    window = torch.randint(TINY.vocab_size, (2, 49), generator=generator)
    tokens, labels = window[:, :-1], window[:, 1:].contiguous()  # (batch, seq)
    with torch.no_grad():
        expected = logits_of(ours, tokens)  # (batch, seq, vocab)
        actual = logits_of(theirs, tokens)
    # Order of float32 summation: measured 1e-6 of the largest logit.
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)
    our_loss = LOSSES["ours"](ours, tokens, labels)
    torch.testing.assert_close(LOSSES[name](theirs, tokens, labels), our_loss, rtol=1e-5, atol=0)


def test_case_is_measured_with_all_installed_baselines(data_overrides: list[str]) -> None:
    done = start_python([*BENCH, *data_overrides])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "\n12M_eager_bf16 " in done.stdout, output
    for name in BASELINES:
        times = f"{name} is not installed" if find_spec(name) is None else f"   {name} "
        assert times in done.stdout, output
    assert done.stdout.count(", kept ") == sum(find_spec(name) is not None for name in BASELINES)


@pytest.mark.parametrize(
    ("name", "keeps"),
    {"ours": True, "transformers": False, f"transformers{WITH_ALLOCATOR}": True}.items(),
)
def test_baseline_has_our_allocator_setting_only_if_requested(
    monkeypatch: pytest.MonkeyPatch, name: str, keeps: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("bench.training_step.keep_freed_memory", lambda: calls.append(True))
    config = SimpleNamespace(model=TINY, run=SimpleNamespace(seed=0))
    checked: Any = (config, None, None)
    if name != "ours":
        pytest.importorskip("transformers")
    Implementation(name, "fp32", checked)
    assert calls == [True] * keeps


def test_failing_baseline_aborts_the_bench_with_its_error(
    data_overrides: list[str], tmp_path: Path
) -> None:
    for part, file in {"": "__init__.py", "-0.dist-info": "METADATA"}.items():
        (tmp_path / f"litgpt{part}").mkdir()
        (tmp_path / f"litgpt{part}" / file).write_text("Version: 0" if part else "1 / 0")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = start_python([*BENCH, *data_overrides], environment={"PYTHONPATH": path})
    assert done.returncode == 1
    assert "ChildProcessError: litgpt: " in done.stderr, done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero"), done.stderr


class Service:
    """Methods called in another process."""

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os._exit(7)


def test_dead_process_is_reported_with_its_exit_code() -> None:
    remote = Remote("service", Service)
    assert remote.call("pid") == remote.process.pid != os.getpid()
    for _ in range(2):
        with pytest.raises(ChildProcessError, match=r"service: .* exit code 7"):
            remote.call("die")
    remote.close()
