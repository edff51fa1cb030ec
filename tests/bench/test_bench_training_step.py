"""The bench of the training step in small: its peers compute what we compute, and it can be run."""

from importlib.util import find_spec

import pytest
import torch
from conftest import start_python

from bench.peers import LOSSES, PEERS, litgpt_llama, logits_of, transformers_llama
from model.config import ModelConfig
from model.llama import Llama

TINY = ModelConfig("tiny", 64, 2, 4, 2, 96, 97, max_seq_len=48)
MODELS = {"transformers": transformers_llama, "litgpt": litgpt_llama}


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
    small = [
        *("model.dim=64", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=2"),
        *("model.ffn_dim=64", "train.seq_len=64", "tokenizer=byte"),
    ]
    done = start_python(["-m", "bench.training_step", "12M_eager_bf16", *small, *data_overrides])
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "\n12M_eager_bf16 " in done.stdout, told
    for name in PEERS:
        times = f"{name} is not installed" if find_spec(name) is None else f"   {name} "
        assert times in done.stdout, told
