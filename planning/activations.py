"""Closed forms of activation memory per rank, in bytes.

Sizes of hidden states and inputs, and what the compiler's partitioner keeps of a block. All are for
one micro-batch and local to a rank: `local_tokens` are the tokens of a tensor-parallel group.
"""

from planning.step_spec import StepSpec

FLOAT32, INT64 = 4, 8  # bytes
HALF_BUDGET = 0.5
"""Activation memory budget from which the compiler saves both input products of the FFN."""


def block_input_bytes(spec: StepSpec) -> int:
    """Return the size of the hidden states between blocks, sharded under sequence parallelism."""
    return tokens_between_matmuls(spec) * spec.model.dim * spec.param_bytes


def tokens_between_matmuls(spec: StepSpec) -> int:
    """Return the tokens per rank outside tensor-parallel matrix products."""
    return spec.local_tokens // (spec.mesh.tp if uses_sequence_parallel(spec) else 1)


def full_hidden_bytes(spec: StepSpec) -> int:
    """Return the size of the unsharded hidden states that enter tensor-parallel products."""
    return spec.local_tokens * spec.model.dim * spec.param_bytes


def uses_sequence_parallel(spec: StepSpec) -> bool:
    """Return whether tensor-parallel ranks shard the tokens between matrix products."""
    return spec.mesh.tp > 1 and spec.parallel.sequence_parallel


def batch_bytes(spec: StepSpec) -> int:
    """Return the size of tokens, positions, labels, RoPE rotations and the mask."""
    integers = 3 * spec.micro_batch_size * spec.seq_len * INT64
    if spec.mesh.cp > 1:
        integers += 3 * spec.local_tokens * INT64
    # (batch, local seq) if positions differ by sample (documents), else (1, local seq)
    rows = spec.local_tokens // (1 if spec.document_mask else spec.micro_batch_size)
    rotations = rows * spec.model.head_dim * FLOAT32
    return integers + rotations + mask_bytes(spec)


def mask_bytes(spec: StepSpec) -> int:
    """Return the size of a dense attention mask, 0 for kernels without one."""
    rows = spec.local_tokens // (1 if spec.document_mask else spec.micro_batch_size)
    return rows * spec.seq_len * spec.param_bytes if spec.has_dense_mask else 0


def norm_is_decomposed(spec: StepSpec) -> bool:
    """Return whether an uncompiled RMSNorm runs as separate operations (DTensors on CPU)."""
    return spec.accelerator == "cpu" and spec.mesh.tp > 1


def _kv_width(spec: StepSpec) -> int:
    return spec.model.n_kv_heads * spec.model.head_dim // spec.mesh.tp


def _attention_saved_bytes(spec: StepSpec) -> int:
    """Return the size of queries, keys, values, output and log-sum-exp.

    The compiler recomputes expanded keys and values from those that it saves.
    """
    tokens, p, tp = spec.local_tokens, spec.param_bytes, spec.mesh.tp
    queries = tokens * spec.model.dim // tp * p
    keys = tokens * spec.mesh.cp * _kv_width(spec) * p
    return 2 * queries + 2 * keys + tokens * (spec.model.n_heads // tp) * FLOAT32


def block_saved_bytes(spec: StepSpec, checkpoint: str | float | None = None) -> int:
    """Return the bytes that one compiled block keeps until its backward.

    Args:
        checkpoint: Overrides `parallel.activation_checkpoint`.
    """
    mode = spec.parallel.activation_checkpoint if checkpoint is None else checkpoint
    model, tp, tokens, p = spec.model, spec.mesh.tp, spec.local_tokens, spec.param_bytes
    width, ffn = model.dim // tp, model.ffn_dim // tp
    if isinstance(mode, float):
        return _saved_within_budget(spec, mode)
    if mode == "full":
        return block_input_bytes(spec)
    if mode == "selective":
        # Only the tp-reduced output of attention: that of the FFN is the next block's input.
        attention = tokens * (width * p + model.n_heads // tp * FLOAT32)
        products = tokens * (width + 2 * _kv_width(spec) + 2 * ffn) * p
        return 2 * block_input_bytes(spec) + products + attention
    normed = 2 * full_hidden_bytes(spec)  # inputs of attention and FFN
    norms = 2 * (block_input_bytes(spec) + tokens_between_matmuls(spec) * FLOAT32)
    # The compiler recomputes silu.
    return norms + normed + _attention_saved_bytes(spec) + 3 * tokens * ffn * p


def _saved_within_budget(spec: StepSpec, budget: float) -> int:
    """Return the bytes that one block saves under a compiler memory budget.

    The partitioner fills the budget with outputs of matrix products, selected by a knapsack solver
    that is not modeled here. Beyond all of these (the `selective` mode) it saves nothing more until
    everything fits (torch/_functorch/partitioners.py: `choose_saved_values_set`). Received tensors
    are saved in addition unless the budget is 0.
    """
    least, most = block_saved_bytes(spec, "full"), block_saved_bytes(spec, "none")
    if budget in (0, 1):
        return most if budget else least
    gathered = 2 * full_hidden_bytes(spec) if uses_sequence_parallel(spec) else 0
    if spec.mesh.cp > 1:
        keys = spec.local_tokens * spec.mesh.cp
        gathered += 2 * keys * _kv_width(spec) * spec.param_bytes
    reduced = block_input_bytes(spec) if spec.mesh.tp > 1 else 0
    saved = least + gathered + reduced + round(budget * (most - least))
    return min(saved, block_saved_bytes(spec, "selective") + gathered)
