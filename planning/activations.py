"""Closed forms of activation memory per rank, in bytes.

Counts the tensors that autograd saves for the backward (eager), or that the compiler's partitioner
keeps, and the buffers of a block's backward. All sizes are for one micro-batch and local to a rank:
`local_tokens` are the tokens of a tensor-parallel group.
"""

from planning.step_spec import StepSpec

FLOAT32, INT64 = 4, 8  # bytes
HALF_BUDGET = 0.5
"""Activation memory budget from which the compiler saves both input products of the FFN."""


def block_input_bytes(spec: StepSpec) -> int:
    """Return the size of the hidden states between blocks, sharded under sequence parallelism."""
    return _tokens_between_matmuls(spec) * spec.model.dim * spec.param_bytes


def _tokens_between_matmuls(spec: StepSpec) -> int:
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
    mask = rows * spec.seq_len * spec.param_bytes if spec.has_dense_mask else 0
    return integers + rotations + mask


def head_saved_bytes(spec: StepSpec) -> int:
    """Return the bytes saved by the last norm and the head: head input and, under
    sequence parallelism, its shard.
    """
    shard = block_input_bytes(spec) if uses_sequence_parallel(spec) else 0
    return _norm_saved_bytes(spec, compiled=False) + full_hidden_bytes(spec) + shard


def last_norm_backward_bytes(spec: StepSpec) -> tuple[int, int]:
    """Return the remainder of `head_saved_bytes` and the float32 temporaries of the last norm."""
    elements = _tokens_between_matmuls(spec) * spec.model.dim * FLOAT32
    if norm_is_decomposed(spec):
        return elements, 5 * elements
    # Input, gradient and result; for narrower types also a float32 copy of each.
    hidden = block_input_bytes(spec)
    wide = elements if spec.param_bytes == FLOAT32 else hidden + 3 * elements
    return hidden, hidden + wide


def norm_is_decomposed(spec: StepSpec) -> bool:
    """Return whether an uncompiled RMSNorm runs as separate operations (DTensors on CPU)."""
    return spec.accelerator == "cpu" and spec.mesh.tp > 1


def _norm_saved_bytes(spec: StepSpec, compiled: bool) -> int:
    """Return the bytes saved by RMSNorm: its input, and float32 intermediates if decomposed."""
    tokens = _tokens_between_matmuls(spec)
    inverse_rms = tokens * FLOAT32
    if compiled or not norm_is_decomposed(spec):
        return block_input_bytes(spec) + inverse_rms
    # The input in float32 and the normalized input.
    return 2 * tokens * spec.model.dim * FLOAT32 + inverse_rms


def _kv_width(spec: StepSpec) -> int:
    return spec.model.n_kv_heads * spec.model.head_dim // spec.mesh.tp


def _attention_saved_bytes(spec: StepSpec) -> int:
    """Return the size of queries, keys, values, output and log-sum-exp.

    The compiler recomputes expanded keys and values from those that it saves.
    """
    tokens, p, tp = spec.local_tokens, spec.param_bytes, spec.mesh.tp
    queries = tokens * spec.model.dim // tp * p
    heads = spec.model.n_kv_heads if spec.parallel.compile else spec.expanded_kv_heads
    keys = tokens * spec.mesh.cp * heads * spec.model.head_dim // tp * p
    return 2 * queries + 2 * keys + tokens * (spec.model.n_heads // tp) * FLOAT32


def block_saved_bytes(spec: StepSpec, checkpoint: str | float | None = None) -> int:
    """Return the bytes that one block keeps until its backward.

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
        attention = tokens * (width * p + model.n_heads // tp * FLOAT32)
        products = tokens * (width + 2 * _kv_width(spec) + 2 * ffn) * p
        # Outputs added to the residual stream. Compiled: only the tp-reduced output of attention;
        # the output of the FFN is the next block's input.
        outputs = block_input_bytes(spec)
        if not spec.parallel.compile:
            outputs = 2 * (tokens * model.dim * p + (block_input_bytes(spec) if tp > 1 else 0))
        return block_input_bytes(spec) + products + outputs + attention
    normed = 2 * full_hidden_bytes(spec)  # inputs of attention and FFN
    n_ffn_tensors = 3 if spec.parallel.compile else 4  # the compiler recomputes silu
    norms = 2 * _norm_saved_bytes(spec, bool(spec.parallel.compile))
    return norms + normed + _attention_saved_bytes(spec) + n_ffn_tensors * tokens * ffn * p


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


def block_recomputed_bytes(spec: StepSpec) -> int:
    """Return the bytes of recomputed activations during the backward of a block's FFN."""
    mode = spec.parallel.activation_checkpoint
    if mode in ("none", 1.0):
        return 0
    if spec.parallel.compile:
        return _recomputed_by_compiler(spec)
    everything = block_saved_bytes(spec, "none")
    if mode == "full":
        # The block's input is already counted, unless the norm saves it in float32.
        widened = norm_is_decomposed(spec) and spec.param_bytes < FLOAT32
        return everything - (0 if widened else block_input_bytes(spec))
    model, tp, tokens, p = spec.model, spec.mesh.tp, spec.local_tokens, spec.param_bytes
    width = model.dim // tp
    # Saved tensors are returned unchanged; intermediates are freed after their last use.
    values = 0 if spec.mesh.cp > 1 else _kv_width(spec)
    saved = tokens * (width + values + 2 * model.ffn_dim // tp) * p
    freed = tokens * (width + _kv_width(spec) + model.dim) * p
    freed += block_input_bytes(spec) if tp > 1 else 0
    return everything - saved - freed - tokens * model.n_heads // tp * FLOAT32


def _recomputed_by_compiler(spec: StepSpec) -> int:
    """Return the same if a compiled kernel recomputes the input of w2 with its gradients."""
    mode = spec.parallel.activation_checkpoint
    w2_input = spec.local_tokens * spec.model.ffn_dim // spec.mesh.tp * spec.param_bytes
    # The gathered gradient of the output of w2 is alive at the same time.
    output_grad = full_hidden_bytes(spec) if uses_sequence_parallel(spec) else 0
    if mode == "selective" or (isinstance(mode, float) and mode >= HALF_BUDGET):
        return 2 * w2_input + output_grad  # the rest is recomputed on demand
    # Everything up to w2, and all tensors that are still alive when the gradients are computed.
    return block_saved_bytes(spec, "none") - block_saved_bytes(spec) + w2_input + output_grad


def backward_buffer_bytes(spec: StepSpec) -> int:
    """Return the bytes of gradients in a block's FFN backward, minus freed activations."""
    ffn = spec.model.ffn_dim // spec.mesh.tp
    return 2 * spec.local_tokens * ffn * spec.param_bytes + block_input_bytes(spec)
