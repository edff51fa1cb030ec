"""Two peers' Llamas with our weights, and a plain training loop for a model of any of the three.

`litgpt` asks for a huggingface-hub older than `transformers` and `datasets` do, so no extra of ours
can name it; its model runs with what is installed, hence `--no-deps`. Weights go to `transformers`
by `formats`, and from there to `litgpt` by litgpt's own converter.
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

PEERS = {  # and how to get them
    "transformers": ".venv/bin/pip install --constraint constraints.txt 'transformers>=4.48'",
    "litgpt": ".venv/bin/pip install --no-deps litgpt==0.5.13",
}


def installed() -> dict[str, str]:
    """The peers that are here, with their versions."""
    return {name: version(name) for name in PEERS if find_spec(name)}


def transformers_weights(model: Llama) -> dict[str, Tensor]:
    """Our parameters under the names of `transformers`, in its pairing for RoPE."""
    head_dim = model.config.head_dim
    return {
        hugging_face_name(name): to_halves(values, head_dim) if name.endswith(PERMUTED) else values
        for name, values in model.state_dict().items()
    }


def transformers_llama(model: Llama) -> nn.Module:
    """The model of `transformers` with our weights and its sdpa attention."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig.from_dict(to_hugging_face(model.config, "float32", None, []))
    config.use_cache = False  # as its Trainer sets it
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    theirs.load_state_dict(transformers_weights(model))
    return theirs.train()


def litgpt_llama(model: Llama) -> nn.Module:
    """The model of `litgpt` with our weights; its attention is sdpa."""
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
    """(batch, seq) -> (batch, seq, vocab), of any of the three."""
    out = model(tokens)
    return out if isinstance(out, Tensor) else out.logits


def our_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean over all targets, as `train.py` has it."""
    return model(tokens, labels=labels) / labels.numel()


def transformers_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean by its own loss function, whose labels are ours: shifted already."""
    return model(tokens, labels=labels, shift_labels=labels).loss


def litgpt_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The mean as its pre-training has it; like Fabric there, it widens autocast's logits."""
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
    """A plain training loop: forward, loss, backward, clipping, torch's fused AdamW."""

    model: nn.Module
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    autocast: bool

    @classmethod
    def of(
        cls, name: str, model: nn.Module, optim: OptimConfig, dtype: str, compiled: bool
    ) -> "Loop":
        """The loop of one of the three, in this process.

        Args:
            dtype: `fp32`; `bf16`, by autocast; `bf16_true`, all of it, moments too.
            compiled: Our model's blocks one by one, as `train.py` does it; the peers' as a whole.
        """
        if dtype == "bf16_true":
            model = model.to(torch.bfloat16)
        # The peers' groups are ours: decay on matrices, none on the norms' weights.
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
        """One step; returns the mean loss."""
        ((tokens, _, labels),) = batches.micro_batches
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.model, tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
