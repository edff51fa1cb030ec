"""The bench of the training step in small: its peers compute what we compute, and it can be run."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import start_python

from bench.peers import LOSSES, MODELS, PEERS, logits_of
from bench.training_step import KEPT, Contender
from bench.turns import Remote
from model.config import ModelConfig
from model.llama import Llama

TINY = ModelConfig("tiny", 64, 2, 4, 2, 96, 97, max_seq_len=48)
SMALL = (
    *("model.dim=64", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=2"),
    *("model.ffn_dim=64", "train.seq_len=64", "tokenizer=byte"),
)
BENCH = ("-m", "bench.training_step", "12M_eager_bf16", *SMALL)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_our_logits_and_our_loss(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {PEERS[name]}")
    generator = torch.Generator().manual_seed(0)
    ours = Llama(TINY)
    with torch.no_grad():
        for parameter in ours.parameters():  # so large that attention is far from uniform
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    theirs = MODELS[name](ours)
    window = torch.randint(TINY.vocab_size, (2, 49), generator=generator)
    tokens, labels = window[:, :-1], window[:, 1:].contiguous()  # (batch, seq)
    with torch.no_grad():
        expected = logits_of(ours, tokens)  # (batch, seq, vocab)
        actual = logits_of(theirs, tokens)
    # Float32 in another order: measured 1e-6 of the largest logit.
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)
    our_loss = LOSSES["ours"](ours, tokens, labels)
    torch.testing.assert_close(LOSSES[name](theirs, tokens, labels), our_loss, rtol=1e-5, atol=0)


def test_a_case_is_measured_beside_the_peers(data_overrides: list[str]) -> None:
    done = start_python([*BENCH, *data_overrides])
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "\n12M_eager_bf16 " in done.stdout, told
    for name in PEERS:
        times = f"{name} is not installed" if find_spec(name) is None else f"   {name} "
        assert times in done.stdout, told
    assert done.stdout.count(", kept ") == sum(find_spec(name) is not None for name in PEERS)


@pytest.mark.parametrize(
    ("name", "keeps"), {"ours": True, "transformers": False, f"transformers{KEPT}": True}.items()
)
def test_a_peer_has_our_allocator_setting_only_where_it_is_named_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str, keeps: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("bench.training_step.keep_freed_memory", lambda: calls.append(True))
    config = SimpleNamespace(model=TINY, run=SimpleNamespace(seed=0))
    checked: Any = (config, None, None)
    if name != "ours":
        pytest.importorskip("transformers")
    Contender(name, "fp32", checked)
    assert calls == [True] * keeps


def test_a_contender_that_fails_ends_the_bench_with_its_error(
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


class Clerk:
    """Answers from another process."""

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os._exit(7)


def test_a_process_that_dies_is_named_with_its_exit_code() -> None:
    remote = Remote("the clerk", Clerk)
    assert remote.ask("pid") == remote.process.pid != os.getpid()
    for _ in range(2):
        with pytest.raises(ChildProcessError, match=r"the clerk: .* exit code 7"):
            remote.ask("die")
    remote.close()
