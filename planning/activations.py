"""What the forward keeps for the backward, and what a block's backward needs besides, in bytes.

Counted tensor by tensor as autograd saves them (eager), or as the compiler's partition keeps them;
(batch, seq) are those of a micro-batch, local to the rank.
"""

from planning.job import Job

FLOAT32, INT64 = 4, 8
HALF = 0.5  # of a budget from here on the feed-forward's first products are a part, both


def block_input(job: Job) -> int:
    """The hidden states between two blocks, local along seq under sequence parallelism."""
    return _between(job) * job.model.dim * job.param_bytes


def _between(job: Job) -> int:
    """Tokens of a rank between the tensor-parallel products."""
    return job.local_tokens // (job.mesh.tp if cuts_tokens(job) else 1)


def whole_hidden(job: Job) -> int:
    """The hidden states where they enter tensor-parallel products, on each of its ranks."""
    return job.local_tokens * job.model.dim * job.param_bytes


def cuts_tokens(job: Job) -> bool:
    """Whether tensor-parallel peers share out the tokens between the products."""
    return job.mesh.tp > 1 and job.parallel.sequence_parallel


def inputs(job: Job) -> int:
    """Of a whole forward: tokens, positions, labels, RoPE's rotations, the mask."""
    whole = job.micro_batch_size * job.seq_len
    integers = 3 * whole * INT64
    if job.mesh.cp > 1:
        integers += 3 * job.local_tokens * INT64
    rotations = _rows(job) * job.model.head_dim * FLOAT32
    return integers + rotations + _mask_elements(job) * job.param_bytes


def _mask_elements(job: Job) -> int:
    """Elements of the dense mask, where there is one: (batch or 1, local seq, seq)."""
    if job.accelerator == "cuda" or not (job.document_mask or job.mesh.cp > 1):
        return 0
    return _rows(job) * job.seq_len


def _rows(job: Job) -> int:
    """(batch, local seq) where documents make each sample differ, else (1, local seq)."""
    return job.local_tokens // (1 if job.document_mask else job.micro_batch_size)


def kept_by_head(job: Job) -> int:
    """The last norm's, and the head's input, whole on each rank and where it is cut as well."""
    cut = block_input(job) if cuts_tokens(job) else 0
    return _kept_by_norm(job, compiled=False) + whole_hidden(job) + cut


def last_norm_backward(job: Job) -> tuple[int, int]:
    """What is left of `kept_by_head`, and the last norm's steps in float32."""
    elements = _between(job) * job.model.dim * FLOAT32
    if many_operations(job):
        return elements, 5 * elements
    # Its input, its gradient and the result; where these have fewer bits, all three wide as well.
    wide = elements if job.param_bytes == FLOAT32 else block_input(job) + 3 * elements
    return block_input(job), block_input(job) + wide


def many_operations(job: Job) -> bool:
    """Whether a norm that is not compiled is such, and not one kernel or function: of DTensors."""
    return job.accelerator == "cpu" and job.mesh.tp > 1


def _kept_by_norm(job: Job, compiled: bool) -> int:
    """Of an RMSNorm: its input, and where it is many operations their results in float32."""
    elements, roots = _between(job) * job.model.dim, _between(job) * FLOAT32
    if compiled or not many_operations(job):
        return block_input(job) + roots
    # The input, widened where it has fewer bits, and the input over its root.
    return 2 * elements * FLOAT32 + roots


def _attention(job: Job) -> int:
    """Queries, keys, values, result and logarithms of sums, as the kernel saves them."""
    model, tp = job.model, job.mesh.tp
    tokens, p = job.local_tokens, job.param_bytes
    heads = model.n_heads // tp
    width, kv_width = model.dim // tp, model.n_kv_heads * model.head_dim // tp
    keys = tokens * job.mesh.cp
    return 2 * tokens * width * p + 2 * keys * kv_width * p + tokens * heads * FLOAT32


def kept_by_block(job: Job, checkpoint: str | float | None = None) -> int:
    """Of one block, until its backward.

    Args:
        checkpoint: In the place of the job's own `activation_checkpoint`.
    """
    mode = job.parallel.activation_checkpoint if checkpoint is None else checkpoint
    model, tp, tokens, p = job.model, job.mesh.tp, job.local_tokens, job.param_bytes
    width, kv_width = model.dim // tp, model.n_kv_heads * model.head_dim // tp
    ffn = model.ffn_dim // tp
    if isinstance(mode, float):
        return _kept_within(job, mode)
    if mode == "full":
        return block_input(job)
    out = tokens * (width * p + model.n_heads // tp * FLOAT32)
    if mode == "selective":
        products = tokens * (width + 2 * kv_width + 2 * ffn) * p
        # What goes back into the hidden states: compiled, of the first the sum over tp, and of the
        # last nothing, since it is what comes next.
        results = block_input(job)
        if not job.parallel.compile:
            results = 2 * (tokens * model.dim * p + (block_input(job) if tp > 1 else 0))
        return block_input(job) + products + results + out
    normed = 2 * tokens * model.dim * p  # inputs of attention and feed-forward, whole
    inside = 3 if job.parallel.compile else 4  # a compiler computes silu again
    norms = 2 * _kept_by_norm(job, job.parallel.compile)
    return norms + normed + _attention(job) + inside * tokens * ffn * p


def _kept_within(job: Job, budget: float) -> int:
    """Of one block, where the compiler may keep a share of what it would like to keep.

    It fills its budget with results of products (which of them is a knapsack's choice, and not
    counted here), and above all of them, which `selective` keeps, it has nothing more to fill it
    with until it may keep everything (torch/_functorch/partitioners.py: `choose_saved_values_set`).
    What it has received it keeps besides, unless it keeps nothing.
    """
    least, most = kept_by_block(job, "full"), kept_by_block(job, "none")
    if budget in (0, 1):
        return most if budget else least
    gathered = 2 * whole_hidden(job) if cuts_tokens(job) else 0
    if job.mesh.cp > 1:
        kv_width = job.model.n_kv_heads * job.model.head_dim // job.mesh.tp
        gathered += 2 * job.local_tokens * job.mesh.cp * kv_width * job.param_bytes
    summed = block_input(job) if job.mesh.tp > 1 else 0
    kept = least + gathered + summed + round(budget * (most - least))
    return min(kept, kept_by_block(job, "selective") + gathered)


def recomputed_by_block(job: Job) -> int:
    """What recomputation brings back of a block until its feed-forward's backward is at work."""
    mode = job.parallel.activation_checkpoint
    if mode in ("none", 1.0):
        return 0
    if job.parallel.compile:
        return _recomputed_by_compiler(job)
    whole = kept_by_block(job, "none")
    if mode == "full":
        # The block's input is there already, but where a norm keeps it widened.
        widened = many_operations(job) and job.param_bytes < FLOAT32
        return whole - (0 if widened else block_input(job))
    model, tp, tokens, p = job.model, job.mesh.tp, job.local_tokens, job.param_bytes
    width, kv_width = model.dim // tp, model.n_kv_heads * model.head_dim // tp
    # What was kept comes back as it is; what only led to it is let go once it was read.
    values = 0 if job.mesh.cp > 1 else kv_width
    kept = tokens * (width + values + 2 * model.ffn_dim // tp) * p
    read = tokens * (width + kv_width + model.dim) * p + (block_input(job) if tp > 1 else 0)
    return whole - kept - read - tokens * model.n_heads // tp * FLOAT32


def _recomputed_by_compiler(job: Job) -> int:
    """The same where one kernel makes the input of the last product anew, with the gradients."""
    mode = job.parallel.activation_checkpoint
    again = job.local_tokens * job.model.ffn_dim // job.mesh.tp * job.param_bytes
    # Meanwhile the gradient of the last product's result waits, gathered where tokens are cut.
    waiting = whole_hidden(job) if cuts_tokens(job) else 0
    if mode == "selective" or (isinstance(mode, float) and mode >= HALF):
        return 2 * again + waiting  # and the rest when it is needed
    # All that leads there, and what is not let go before the gradients are made.
    return kept_by_block(job, "none") - kept_by_block(job) + again + waiting


def backward_buffers(job: Job) -> int:
    """In the middle of a block's feed-forward: gradients, less what has been let go."""
    ffn = job.model.ffn_dim // job.mesh.tp
    return 2 * job.local_tokens * ffn * job.param_bytes + block_input(job)
