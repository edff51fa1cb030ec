"""A configuration as the planner takes it, and the planner's verdict before a run begins.

`train.py` asks whether each rank has the memory that a step needs, before anything is allocated or
written; `plan.py` asks much more, with the same jobs and the same rules (`planning.config`).
Imports nothing heavy but where GPUs are asked for their memory.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data.stages import plan_stages
from parallel.mesh import MeshShape, Processes, is_first_process
from planning.config import planned_errors
from planning.hardware import PROCESS_GIB, Hardware, hardware_of, load_hardware
from planning.job import Job, resolved_precision
from planning.memory import Memory
from planning.plan import GIB, PARTS, plan_run
from planning.search import Choice, SearchSpace, fewest_devices, fullest, remedy
from training.config import JobConfig
from training.config_rules import (
    batch_errors,
    for_every_stage,
    fp8_size_errors,
)
from training.config_validation import ConfigError

LOCAL = "local"
"""The hardware file that `plan.py calibrate=true` writes of this machine."""
CONTEXT_GIB = 0.5
"""What CUDA keeps for itself on a GPU that no hardware file knows."""


def given_choice(config: JobConfig, mesh: MeshShape) -> Choice:
    """What a configuration has chosen itself."""
    parallel = config.parallel
    return Choice(
        mesh,
        config.train.micro_batch_size,
        parallel.activation_checkpoint,
        parallel.reshard_after_forward,
        parallel.reduce_gradients,
    )


class PlanRequest:
    """One configuration: the jobs that it asks for, and the rules on what may be chosen for it."""

    def __init__(
        self, config: JobConfig, accelerator: str, tokens: int, hopper: bool = True
    ) -> None:
        self.config, self.accelerator, self.tokens = config, accelerator, tokens
        self.hopper = hopper
        self.precision = resolved_precision(config.precision, accelerator)

    def search_space(self) -> SearchSpace:
        """The same as the search takes it."""
        batch = self.config.train.global_batch_size
        return SearchSpace(
            parallel=self.config.parallel,
            share=lambda mesh: batch // mesh.dp,
            mesh_errors=self.mesh_errors,
            choice_errors=self.choice_errors,
            jobs=self.jobs,
        )

    def jobs(self, choice: Choice) -> list[tuple[Job, int]]:
        """One for each length and batch that the run goes through, with its tokens."""
        config, train = self.config, self.config.train
        stages, _ = plan_stages(
            config.data,
            seq_len=train.seq_len,
            global_batch_size=train.global_batch_size,
            micro_batch_size=choice.micro_batch_size,
        )
        ends = [stage.first_token for stage in stages.all[1:]] + [self.tokens]
        tokens: dict[Job, int] = {}
        for stage, end in zip(stages.all, ends, strict=True):
            own = min(end, self.tokens) - stage.first_token
            if own <= 0 and stage.first_token:
                continue  # the run ends before it
            job = Job(
                model=config.model,
                mesh=choice.mesh,
                parallel=choice.parallel(config.parallel),
                precision=self.precision,
                accelerator="cuda" if self.accelerator == "cuda" else "cpu",
                seq_len=stage.seq_len,
                global_batch_size=stage.global_batch_size,
                micro_batch_size=stage.micro_batch_size
                or stage.global_batch_size // choice.mesh.dp,
                document_mask=config.data.document_mask,
            )
            tokens[job] = tokens.get(job, 0) + own
        return list(tokens.items())

    def mesh_errors(self, mesh: MeshShape) -> list[str]:
        """What `train.py` has against a mesh, however a rank computes on it."""
        config = self.config
        whole = replace(config.train, micro_batch_size=None)
        return planned_errors(
            self.accelerator,
            mesh,
            config.parallel,
            self.precision,
            config.model,
            whole,
            config.data,
            self.hopper,
        )

    def choice_errors(self, choice: Choice) -> list[str]:
        """What it has against the rest of a choice; of one stage the share's divisors all do."""
        config = self.config
        if self.precision.fp8 is None and not config.data.stages:
            return []
        train = replace(config.train, micro_batch_size=choice.micro_batch_size)
        return for_every_stage(
            train,
            config.data,
            lambda sizes: (
                batch_errors(choice.mesh, sizes)
                or fp8_size_errors(choice.mesh, self.precision, config.model, sizes)
            ),
        )


# ---------------------------------------------------------------- before a run begins


def check_plan(config: JobConfig, processes: Processes, mesh: MeshShape) -> str | None:
    """The planner's verdict in a line, or None where `run.plan_check` is off.

    Raises:
        ConfigError: a step needs more memory than a rank has, and `run.plan_check` refuses that.
    """
    if config.run.plan_check == "off":
        return None
    hardware, room = this_machine(processes)
    tokens = config.stages().first_token(config.train.max_steps)
    question = PlanRequest(config, processes.accelerator, tokens).search_space()
    given = given_choice(config, mesh)
    jobs = question.jobs(given)
    _, memory = fullest(jobs)
    told = f"{memory.peak / GIB:.2f} of {room / GIB:.2f} GiB a rank ({parts(memory)})"
    if memory.peak <= room:
        speed = ""
        if hardware is not None:
            speed = f", about {plan_run(jobs, hardware).tokens_per_second:,.0f} tokens/s"
        return f"plan: fits, {told}{speed}"
    would_fit = _remedy(question, given, room, processes.per_node)
    problem = f"the run does not fit, a step needs {told}: use {would_fit}"
    if config.run.plan_check == "warn":
        return f"plan: {problem}"
    raise ConfigError([f"{problem}; run.plan_check=warn begins all the same"])


def print_fit_check(verdict: str | None) -> None:
    """Prints the verdict, on the first process."""
    if verdict is not None and is_first_process():
        print(verdict, flush=True)


def parts(memory: Memory) -> str:
    """The three largest parts of what a rank holds."""
    sizes = sorted(((getattr(memory, part), part) for part in PARTS), reverse=True)
    return ", ".join(f"{part} {size / GIB:.2f}" for size, part in sizes[:3])


def _remedy(question: SearchSpace, given: Choice, room: int, per_node: int) -> str:
    """What would fit, as words to type."""

    def of_rank(job: Job) -> int:
        return room

    choice = remedy(question, given, of_rank)
    if choice is not None:
        before = given.overrides
        return " ".join(word for word in choice.overrides if word not in before)
    found = fewest_devices(question, of_rank, given.mesh.world_size, per_node)
    if found is None:
        return "a smaller model, shorter sequences or a smaller batch: no mesh of any size fits"
    devices, choice = found
    return f"{devices} devices at least, with {' '.join(choice.overrides)}"


def this_machine(processes: Processes) -> tuple[Hardware | None, int]:
    """What is known of a device here, and the bytes that a rank's tensors may take.

    On CPU the ranks of a node share its memory, all of it: what others use now they may give back.
    The hardware is that of a calibrated file, on GPUs also of a known card.
    """
    known = _calibrated(processes.accelerator)
    if processes.accelerator == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        known = known or hardware_of(properties.name)
        reserved = known.reserved_gib if known else CONTEXT_GIB
        return known, properties.total_memory - int(reserved * GIB)
    return known, machine_memory() // processes.per_node - int(PROCESS_GIB * GIB)


def _calibrated(accelerator: str) -> Hardware | None:
    """What `plan.py calibrate=true` has measured here."""
    try:
        hardware = load_hardware(LOCAL)
    except ValueError:
        return None
    return hardware if hardware.accelerator == accelerator else None


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that the processes on this machine may use together: all, or the cgroup's."""
    limits = []
    for name, read in (
        ("proc/meminfo", _total),
        ("sys/fs/cgroup/memory.max", _number),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", _number),
    ):
        try:
            limits.append(read((root / name).read_text()))
        except (OSError, ValueError):  # "max", or another system
            continue
    return min(limits, default=2**60)


def _total(meminfo: str) -> int:
    """`MemTotal` of /proc/meminfo, which is in KiB."""
    return int(meminfo.partition("MemTotal:")[2].split()[0]) * 1024


_number: Callable[[str], int] = int
