"""Logits, gradients and RoPE frequencies match `transformers` for each file of conf/model."""

from pathlib import Path

import pytest
import torch
from model_configs import FILES, read
from reference_models import hugging_face_config, hugging_face_tensors, paired_models, scaled_down
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfig
from model.rope import rope_frequencies

SEQ = 160  # longer than the small models' original context of 8192 / LENGTH_DIVISOR tokens

# Both implementations compute in float32 in a different order: measured 3e-6 of the largest logit.
# A mistake in the frequencies changes the logits by a quarter of it or more, even if only the start
# of the interpolated range is 3% off.
TOLERANCE = 1e-5


def random_tokens(config: ModelConfig) -> Tensor:
    return torch.randint(
        config.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(1)
    )  # (batch, seq)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logits_match_transformers_beyond_the_original_context(path: Path) -> None:
    config = scaled_down(path)
    ours, theirs = paired_models(config)
    tokens = random_tokens(config)
    with torch.no_grad():
        expected = theirs(tokens).logits  # (batch, seq, vocab)
        actual = ours(tokens)
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", ["llama3_1_8b", "llama3_2_1b"])
def test_gradients_match_transformers(name: str) -> None:
    """One model is untied; the other is tied, so its embedding accumulates two gradients."""
    config = scaled_down(next(path for path in FILES if path.stem == name))
    ours, theirs = paired_models(config)
    tokens = random_tokens(config)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    ours(inputs, labels=labels).backward()
    logits = theirs(inputs).logits
    log_probabilities = logits.log_softmax(-1)  # (batch, seq, vocab)
    (-log_probabilities.gather(-1, labels.unsqueeze(-1)).sum()).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    expected = dict(theirs.named_parameters())
    renamed = hugging_face_tensors(gradients, config)
    assert renamed.keys() == expected.keys()
    for key, actual in renamed.items():
        reference = expected[key].grad
        assert reference is not None
        # Backward also sums over all tokens: measured 5e-6 of the largest element.
        atol = 5 * TOLERANCE * reference.abs().max().item()
        torch.testing.assert_close(actual, reference, rtol=0, atol=atol)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rope_frequencies_match_transformers_at_full_size(path: Path) -> None:
    config = read(path)
    if config.rope_scaling is None:
        theirs = LlamaForCausalLM(hugging_face_config(scaled_down(path)))
        expected = theirs.model.rotary_emb.inv_freq
        actual = rope_frequencies(scaled_down(path))
    else:
        expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](
            hugging_face_config(config), torch.device("cpu")
        )
        assert attention_factor == 1.0
        actual = rope_frequencies(config)
    # A few float32 roundings of 6e-8 each; the subtraction of the interpolation amplifies them.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
