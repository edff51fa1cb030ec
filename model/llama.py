"""The Llama 3 transformer (arXiv:2407.21783), with Meta's module and parameter names.

This module computes one complete, unsharded model in the dtype of its weights. `parallel` replaces
or wraps parts of it, in the order of `parallel.parallelize`:

- `float8` (`precision.fp8`): Linear layers of the blocks become torchao's `Float8Linear`.
- `model.kernels.onednn_linear` (float32 on AMD CPUs): products of the blocks' Linear layers.
- `tensor_parallel` (`parallel.tp` > 1): parameters become sharded DTensors, the forward of
  `tok_embeddings` and `loss` are replaced, `RMSNorm.function` becomes `F.rms_norm`; inside
  `Attention`, q, k and v have local heads.
- `pipeline_parallel` (`parallel.pp` > 1): layers, embedding and head of other stages are removed;
  `forward` is called with a `part`, and without one passes the hidden states through all stages.
- `context_parallel` (`parallel.cp` > 1): `kernel` is replaced, and hooks on `Llama` cut the
  sequence and combine the result.
- `activation_checkpoint` (`parallel.activation_checkpoint`), `compilation` (`parallel.compile`):
  wrap `TransformerBlock.forward`; compilation also the stages of `loss`.
- `data_parallel` (more than one process) and `mixed_precision` (one process): parameters are
  gathered and cast to `precision.param` around each block or forward.

Hence each module takes its input as the first positional argument, and only attention and the loss
depend on seq. Initial weights are in `model.init`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionKernel, Mask
from model.config import ModelConfig, ModelPart
from model.loss import CrossEntropySum
from model.norm import RMSNorm
from model.rope import apply_rope, rope_frequencies, rope_rotations


class Attention(nn.Module):
    """Grouped-query self-attention with rotary position embedding."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kernel = kernel
        kv_width = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask) -> Tensor:
        """(batch, seq, dim) -> (batch, seq, dim); other arguments as in `TransformerBlock`."""
        batch, seq, _ = x.shape
        # The number of heads is inferred, because sharded projections return local heads.
        q = self.wq(x).view(batch, seq, -1, self.head_dim)  # (batch, seq, heads, head_dim)
        k = self.wk(x).view(batch, seq, -1, self.head_dim)  # (batch, seq, kv_heads, head_dim)
        v = self.wv(x).view(batch, seq, -1, self.head_dim)  # (batch, seq, kv_heads, head_dim)
        q, k = apply_rope(q, rotations), apply_rope(k, rotations)
        out = self.kernel(q, k, v, mask)  # (batch, seq, heads, head_dim)
        return self.wo(out.flatten(2))  # (batch, seq, dim)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq, dim) -> (batch, seq, dim)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, with pre-normalization and residual connections."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attention = Attention(config, kernel)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask) -> Tensor:
        """Apply one layer.

        Args:
            x: (batch, seq, dim).
            rotations: (batch or 1, seq, head_dim/2, 2) float32 from `rope_rotations`; mixed
                precision must not cast them.
            mask: From `AttentionKernel.mask`.

        Returns: (batch, seq, dim).
        """
        x = x + self.attention(self.attention_norm(x), rotations, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Map tokens to logits, or, given labels, to the summed loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kernel = AttentionKernel(config.attention, config.head_dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        blocks = (TransformerBlock(config, self.kernel) for _ in range(config.n_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.loss = CrossEntropySum()
        self.parts = [ModelPart(range(config.n_layers), has_embedding=True, has_head=True)]
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the Parameter of tok_embeddings with output if `tie_embeddings` is set.

        Call it again after replacing the parameters of both modules, as sharding does.
        """
        if self.config.tie_embeddings and hasattr(self, "output"):
            self.output.weight = self.tok_embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        # Called by `to`, `to_empty` and others; leaving the meta device separates tied weights.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        token_indices: Tensor | None = None,
        n_documents: int | None = None,
        hidden: Tensor | None = None,
        part: ModelPart | None = None,
    ) -> Tensor:
        """Compute logits or the loss.

        Args:
            tokens: (batch, seq) int64.
            positions: (batch, seq) integers, restarting at 0 with each document; attention stays
                within documents. None: each row is one document starting at 0.
            labels: (batch, seq) int64, the token to predict, `model.loss.IGNORE` where none.
            token_indices: (seq,) integers, global position of each local token, under context
                parallelism. None: the tokens are the full sequence, in order.
            n_documents: Upper bound of the number of documents in these rows. None: kernels that
                need the number read it from the device, which synchronizes.
            hidden: (batch, seq, dim), output of the previous part, for one without embedding.
            part: The part to compute; None: the only one.

        Returns:
            Of a part without head its hidden states (batch, seq, dim), otherwise
            without labels the logits (batch, seq, vocab); with labels the float32 scalar sum of
            the negative log-likelihoods of all targets, in nats.
        """
        part = part or self.parts[0]
        x = self.tok_embeddings(tokens) if part.has_embedding else hidden  # (batch, seq, dim)
        assert x is not None
        mask = self.kernel.mask(positions, token_indices, like=x, n_documents=n_documents)
        if positions is None:
            if token_indices is None:
                token_indices = torch.arange(tokens.shape[1], device=tokens.device)
            positions = token_indices.unsqueeze(0)  # (1, seq)
        rotations = rope_rotations(positions, rope_frequencies(self.config, tokens.device))
        for name, block in self.layers.named_children():
            if int(name) in part.layers:
                x = block(x, rotations, mask)  # (batch, seq, dim)
        if not part.has_head:
            return x
        x = self.norm(x)  # (batch, seq, dim)
        if labels is None:
            return self.output(x)  # (batch, seq, vocab)
        return self.loss(x, self.output.weight, labels)
