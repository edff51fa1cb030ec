"""The Llama 3 transformer (arXiv:2407.21783), with Meta's module and parameter names.

Oblivious of meshes: a parallel plan hooks these modules by name and may hand them fewer heads, a
part of the sequence between the blocks, or a loss of its own. Hence each module takes its input as
the first positional argument, and seq is read only inside attention and the loss.
Outside stay precision (weights are created in float32) and initial values (`model.init`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionKernel, Mask
from model.config import ModelConfig
from model.loss import CrossEntropySum
from model.norm import RMSNorm
from model.rope import apply_rope, rope_frequencies, rope_rotations


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

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
        """(batch, seq, dim) -> the same; the other arguments as in `TransformerBlock`."""
        batch, seq, _ = x.shape
        # The number of heads is what is left, so that sharded projections yield local heads.
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
        """(batch, seq, dim) -> the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each normalised before and added to its input."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attention = Attention(config, kernel)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask) -> Tensor:
        """One layer.

        Args:
            x: (batch, seq, dim).
            rotations: (batch or 1, seq, head_dim/2, 2) float32 from `rope_rotations`; a precision
                policy must not cast them.
            mask: From the attention kernel.

        Returns: (batch, seq, dim).
        """
        x = x + self.attention(self.attention_norm(x), rotations, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Tokens to logits, or with labels to the summed loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kernel = AttentionKernel(config.attention)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            TransformerBlock(config, self.kernel) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.loss = CrossEntropySum()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make output.weight the very Parameter of tok_embeddings, where the configuration ties.

        To be called again by whoever replaces the parameters of the two modules one by one, as
        sharding does.
        """
        if self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        # Behind `to`, `to_empty` and the like; leaving the meta device makes two parameters of one.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        n_documents: int | None = None,
    ) -> Tensor:
        """Run the model.

        Args:
            tokens: (batch, seq) int64.
            positions: (batch, seq) integers, restarting at 0 with each document, attention stays
                inside documents. None: each row is one document from 0.
            labels: (batch, seq) int64, the token to predict at each place, `model.loss.IGNORE`
                where there is none.
            places: (seq,) integers, where in the whole sequence these columns lie. None: they are
                the whole sequence, in order.
            n_documents: No more begin in these rows. None: a kernel that needs to know asks the
                device, and the host waits.

        Returns:
            Logits (batch, seq, vocab) without labels; with labels the float32 scalar sum of the
            negative log-likelihoods of all targets, in nats.
        """
        x = self.tok_embeddings(tokens)  # (batch, seq, dim)
        mask = self.kernel.mask(positions, places, like=x, n_documents=n_documents)
        if positions is None:
            whole = torch.arange(tokens.shape[1], device=tokens.device)
            positions = (whole if places is None else places).unsqueeze(0)  # (1, seq)
        rotations = rope_rotations(positions, rope_frequencies(self.config, tokens.device))
        for block in self.layers:
            x = block(x, rotations, mask)  # (batch, seq, dim)
        x = self.norm(x)  # (batch, seq, dim)
        if labels is None:
            return self.output(x)  # (batch, seq, vocab)
        return self.loss(x, self.output.weight, labels)
