"""What a rank holds at the fullest moment of a step, in closed form.

Integers alone, microseconds a call. Each formula counts what `parallelize`, FSDP2 and autograd make
a rank keep; a test holds it against the traced tier, which follows the tensors themselves.
"""

from dataclasses import dataclass

from planning.job import Job


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of a step at which it holds most, by what they are for.

    `parameters`, `gradients` and `optimizer` are the rank's shards, at rest; `activations` what the
    forward keeps for the backward; `gathered` the weights that FSDP2 has gathered, and gradients
    before they are reduced; `logits` the head's chunk; `temporary` the rest. `moment` names it.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    logits: int
    temporary: int
    moment: str = ""

    @property
    def peak(self) -> int:
        """All of them."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.gathered
            + self.logits
            + self.temporary
        )


def step_memory(job: Job) -> Memory:
    """The closed forms of all parts; exact figures are still to come."""
    from model.flops import parameter_count

    ranks = job.mesh.dp_shard * job.mesh.cp * job.mesh.tp
    local = parameter_count(job.model) // ranks
    moments = {"fp32": 8, "bf16": 4, "int8": 2}[job.precision.optimizer_state]
    token = 34 * job.model.dim // job.mesh.tp * job.param_bytes // 2
    return Memory(
        parameters=4 * local,
        gradients=4 * local,
        optimizer=moments * local,
        activations=job.local_tokens * token * job.model.n_layers,
        gathered=2 * parameter_count(job.model) // job.model.n_layers * job.param_bytes,
        logits=min(job.step.head_chunk, job.local_tokens) * job.model.vocab_size * job.param_bytes,
        temporary=0,
        moment="head",
    )
