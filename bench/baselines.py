"""Llama models of `transformers` and `litgpt` with our weights, and a plain training loop.

`litgpt` requires an older huggingface-hub than `transformers` and `datasets`, so it cannot be one
of our extras; its model works with the installed version, hence `--no-deps`. Weights are converted
to `transformers` by `formats`, and from there to `litgpt` by its own converter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import StepBatches
from formats.config_json import to_hugging_face
from formats.hugging_face import PERMUTED, hugging_face_name, to_halves
from model.llama import Llama
from parallel.compilation import apply_compile
from training.config import OptimConfig
from training.optimizer import build_optimizer

BASELINES = {  # name: installation command
    "transformers": ".venv/bin/pip install --constraint constraints.txt 'transformers>=4.48'",
    "litgpt": ".venv/bin/pip install --no-deps litgpt==0.5.13",
}


def installed() -> dict[str, str]:
    """Return the installed baselines with their versions."""
    return {name: version(name) for name in BASELINES if find_spec(name)}


def transformers_weights(model: Llama) -> dict[str, Tensor]:
    """Return our parameters with the names and RoPE pairing of `transformers`."""
    head_dim = model.config.head_dim
    return {
        hugging_face_name(name): to_halves(values, head_dim) if name.endswith(PERMUTED) else values
        for name, values in model.state_dict().items()
    }


def transformers_llama(model: Llama) -> nn.Module:
    """Return the `transformers` model with our weights and sdpa attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig.from_dict(to_hugging_face(model.config, "float32", {}))
    config.use_cache = False  # as its Trainer does
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    theirs.load_state_dict(transformers_weights(model))
    return theirs.train()


def litgpt_llama(model: Llama) -> nn.Module:
    """Return the `litgpt` model with our weights; it uses sdpa attention."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    ours = model.config
    config = Config(
        name="ours",
        block_size=ours.max_seq_len,
        n_layer=ours.n_layers,
        n_embd=ours.dim,
        n_head=ours.n_heads,
        n_query_groups=ours.n_kv_heads,
        intermediate_size=ours.ffn_dim,
        vocab_size=ours.vocab_size,
        padded_vocab_size=ours.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=ours.norm_eps,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int(ours.rope_theta),
        parallel_residual=False,
        bias=False,
    )
    theirs, weights = GPT(config), dict[str, Tensor]()
    copy_weights_hf_llama(config, {}, weights, dict(transformers_weights(model)))
    theirs.load_state_dict(weights)
    return theirs.train()


MODELS: dict[str, Callable[[Llama], Any]] = {
    "ours": lambda model: model,
    "transformers": transformers_llama,
    "litgpt": litgpt_llama,
}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of any of the three: (batch, seq) -> (batch, seq, vocab)."""
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def our_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over all targets, as in `train.py`."""
    return model(tokens, labels=labels) / labels.numel()


def transformers_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the mean by its loss function, given labels that are already shifted."""
    return model(tokens, labels=labels, shift_labels=labels).loss


def litgpt_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Return the mean as in its pre-training, with autocast logits converted to float32."""
    from litgpt.utils import chunked_cross_entropy

    logits = model(tokens)
    widened = logits.float() if torch.is_autocast_enabled("cpu") else logits
    return chunked_cross_entropy(widened, labels)


LOSSES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "ours": our_loss,
    "transformers": transformers_loss,
    "litgpt": litgpt_loss,
}


@dataclass
class Loop:
    """A plain training loop: forward, loss, backward, clipping, fused AdamW."""

    model: nn.Module
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    autocast: bool

    @classmethod
    def of(
        cls, name: str, model: nn.Module, optim: OptimConfig, dtype: str, compiled: bool
    ) -> "Loop":
        """Return the loop of one of the three implementations.

        Args:
            dtype: `fp32`; `bf16` (autocast); or `bf16_true` (weights and optimizer state in bf16).
            compiled: Compile our model block by block, as `train.py` does, and the others entirely.
        """
        if dtype == "bf16_true":
            model = model.to(torch.bfloat16)
        # All use our parameter groups: weight decay on matrices only.
        optimizer = torch.optim.AdamW(build_optimizer(model, optim).param_groups)
        if isinstance(model, Llama):
            if compiled:
                apply_compile(model)
        elif compiled:
            model = torch.compile(model)  # type: ignore[assignment]
        return cls(model, LOSSES[name], optimizer, autocast=dtype == "bf16")

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, seq) -> (batch, seq, vocab)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return logits_of(self.model, tokens)

    def step(self, batches: StepBatches) -> Tensor:
        """Run one step and return the mean loss."""
        ((tokens, _, labels),) = batches.micro_batches
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.model, tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
