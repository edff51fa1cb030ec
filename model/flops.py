"""Closed forms of a model's size and of the arithmetic that a token costs.

Plain integers from the configuration, so that planning and metrics need no model in memory. The
tests hold them against counting the modules on the meta device.
"""

from model.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model; a tied embedding counts once."""
    embeddings = 1 if config.tie_embeddings else 2
    return _without_embeddings(config) + embeddings * config.vocab_size * config.dim


def flops_per_token(config: ModelConfig, seq_len: int, causal: bool) -> int:
    """Floating-point operations of forward and backward for one token, recomputation left out.

    6·N + 12·layers·heads·head_dim·seq_len (PaLM, arXiv:2204.02311, appendix B), N without the input
    embedding, which multiplies nothing, but with the output head, tied or not. `causal` halves the
    second term: a token looks at half of the sequence on average.
    """
    multiplied = _without_embeddings(config) + config.vocab_size * config.dim
    scores = 12 * config.n_layers * config.n_heads * config.head_dim * seq_len
    return 6 * multiplied + (scores // 2 if causal else scores)


def _without_embeddings(config: ModelConfig) -> int:
    """Parameters of all layers and of the last norm."""
    kv_width = config.n_kv_heads * config.head_dim
    attention = 2 * config.dim * config.dim + 2 * config.dim * kv_width
    feed_forward = 3 * config.dim * config.ffn_dim
    norms = 2 * config.dim
    return config.n_layers * (attention + feed_forward + norms) + config.dim
