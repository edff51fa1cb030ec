"""Closed forms for a model's parameter count and FLOPs per token.

They need only the configuration, so planning and metrics use them without building a model. Tests
compare them with a model on the meta device.
"""

from model.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters; tied embeddings count once."""
    embeddings = 1 if config.tie_embeddings else 2
    return _non_embedding_count(config) + embeddings * config.vocab_size * config.dim


def flops_per_token(config: ModelConfig, seq_len: int, causal: bool) -> int:
    """Return the FLOPs of forward and backward for one token, without recomputation.

    6·N + 12·layers·heads·head_dim·seq_len (PaLM, arXiv:2204.02311, appendix B). N excludes the
    input embedding, which is a lookup, and includes the output head, tied or not. `causal` halves
    the second term, because a token attends to half of the sequence on average.
    """
    multiplied = _non_embedding_count(config) + config.vocab_size * config.dim
    scores = 12 * config.n_layers * config.n_heads * config.head_dim * seq_len
    return 6 * multiplied + (scores // 2 if causal else scores)


def _non_embedding_count(config: ModelConfig) -> int:
    kv_width = config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_width
    feed_forward = 3 * config.dim * config.ffn_dim
    norms = 2 * config.dim
    return config.n_layers * (attention + feed_forward + norms) + config.dim
