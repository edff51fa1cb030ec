"""Everything that can be refused before a process is launched or anything is written.

Each check raises an error whose message names key, value, rule and remedy. What a launched run
finds out later (a full disk, a dead peer) is not here.
"""

import dataclasses
import json
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cli.config import JobConfig, Rule, load_train_config, plain
from data.config import DataConfig
from data.errors import DataError
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import (
    MeshShape,
    Processes,
    is_first_process,
    plan_processes,
    resolve_mesh,
    started_errors,
)
from resilience.lock import RunLock, hold
from resilience.run_folder import RunFolder, RunFolderError
from training.config import LogConfig, TrainConfig
from training.config_rules import (
    batch_errors,
    device_errors,
    lane_errors,
    model_errors,
    of_every_stage,
    saving_errors,
)
from training.initial_weights import check_initial_tokenizer, check_initial_weights
from training.precision_rules import fp8_errors, torchao_errors
from training.resume_policy import Changes

if TYPE_CHECKING:
    from data.dataset import Dataset
    from data.stream import StreamDataset


def check_config(composed: DictConfig) -> tuple[JobConfig, Processes, MeshShape]:
    """The typed configuration, with the processes and the mesh that it asks for on this machine.

    Raises:
        ConfigError: every problem of keys, types, rules, mesh and machine at once.
    """

    def machine_and_mesh(
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        model: ModelConfig,
        train: TrainConfig,
        data: DataConfig,
    ) -> list[str]:
        processes, problems = plan_processes(parallel)
        mesh, more = resolve_mesh(parallel, processes.world_size)
        problems += device_errors(processes.accelerator, mesh, parallel, precision, model)
        if more:
            return problems + more

        def of_fp8(train: TrainConfig) -> list[str]:
            return fp8_errors(processes.accelerator, mesh, precision, model, train)

        problems += mesh_errors(mesh, parallel, model, train, data)
        return problems + of_every_stage(train, data, of_fp8)

    config = load_train_config(
        composed,
        (("parallel", "precision", "model", "train", "data"), machine_and_mesh),
        *MORE_RULES,
    )
    processes, _ = plan_processes(config.parallel)
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    return config, processes, mesh


def check_for_tasks(composed: DictConfig, per_node: int, num_nodes: int) -> JobConfig:
    """The typed configuration of a run whose tasks will start elsewhere, on machines unseen.

    Args:
        composed: What Hydra composed.
        per_node: Number of tasks on each node.
        num_nodes: Number of nodes.

    Raises:
        ConfigError: every problem of keys, types, rules and mesh at once.
    """

    def mesh_of_tasks(
        parallel: ParallelConfig, model: ModelConfig, train: TrainConfig, data: DataConfig
    ) -> list[str]:
        tasks = Processes("auto", per_node, num_nodes, "srun")
        problems = started_errors(parallel, tasks)
        mesh, more = resolve_mesh(parallel, tasks.world_size)
        return problems + (more or mesh_errors(mesh, parallel, model, train, data))

    of_tasks = (("parallel", "model", "train", "data"), mesh_of_tasks)
    return load_train_config(composed, of_tasks, *MORE_RULES)


def mesh_errors(
    mesh: MeshShape,
    parallel: ParallelConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
) -> list[str]:
    """The rules that tie model, batches and data to the mesh, whatever it runs on."""

    def of_sizes(train: TrainConfig) -> list[str]:
        return model_errors(mesh, parallel, model, train.seq_len) + batch_errors(mesh, train)

    return lane_errors(mesh, train, data) + of_every_stage(train, data, of_sizes)


def _tracker_errors(log: LogConfig) -> list[str]:
    """A tracker that is asked for and not installed."""
    if log.wandb is None:
        return []
    from training.wandb_logger import wandb_errors

    return wandb_errors(log.wandb)


def _profile_errors(log: LogConfig, train: TrainConfig) -> list[str]:
    """Steps to look into that the run does not get to."""
    beyond = [step for step in log.profile or [] if step > train.max_steps]
    if not beyond:
        return []
    return [
        f"log.profile ({log.profile}) names steps after the last, train.max_steps "
        f"({train.max_steps}): use steps up to {train.max_steps}"
    ]


# Rules beyond the configuration's own, of which neither mesh nor machine is a part.
MORE_RULES: tuple[Rule, ...] = (
    (("checkpoint", "faults"), saving_errors),
    (("log",), _tracker_errors),
    (("precision",), torchao_errors),
    (("log", "train"), _profile_errors),
)


def check_folder(config: JobConfig) -> Changes:
    """What changed since the run's last start.

    Raises:
        RunFolderError: the run may not go on in its folder.
        FormatError, ConfigError: the weights that it is to begin from cannot be read, or are those
            of another model.
    """
    folder = RunFolder(Path(config.run.dir))
    changes = folder.check(plain(config), lambda before: with_defaults(before, config))
    if config.run.init_from is not None and not folder.committed_steps():
        check_initial_weights(config.run, config.model)
    return changes


def with_defaults(before: Any, now: Any) -> Any:
    """A plain configuration of an older version, with the keys added since at their defaults.

    A default is what the program did before it had the key, so the run goes on as it began.

    Args:
        before: The old configuration, or a part of it.
        now: The same of this version, typed.
    """
    if dataclasses.is_dataclass(now) and isinstance(before, dict):
        filled = {
            name: with_defaults(value, getattr(now, name, None)) for name, value in before.items()
        }
        for field in dataclasses.fields(now):
            if field.name in before:
                continue
            if field.default is not dataclasses.MISSING:
                filled[field.name] = json.loads(json.dumps(field.default))
            elif field.default_factory is not dataclasses.MISSING:
                filled[field.name] = json.loads(json.dumps(field.default_factory()))
            elif dataclasses.is_dataclass(getattr(now, field.name)):  # a whole section
                filled[field.name] = with_defaults({}, getattr(now, field.name))
        return filled
    if isinstance(now, dict) and isinstance(before, dict):
        return {name: with_defaults(value, now.get(name)) for name, value in before.items()}
    if isinstance(now, list) and isinstance(before, list):
        return [with_defaults(one, of) for one, of in zip_longest(before, now[: len(before)])]
    return before


def acquire_run_lock(config: JobConfig) -> RunLock | None:
    """Takes the run's folder for this run, until it ends; the first process alone does.

    Raises:
        LockedError: another run is at work in it.
        RunFolderError: nothing can be written there.
    """
    if not is_first_process():
        return None
    return hold(RunFolder(Path(config.run.dir)), lambda told: print(told, flush=True))


def prepare_data(config: JobConfig) -> "Dataset | StreamDataset":
    """The dataset, prepared on first use by the first process while the others wait, or streamed.

    Raises:
        DataError: it cannot be prepared or read, or is too small.
        RunFolderError: the run's newest checkpoint was trained on other tokens.
    """
    streams = config.data.stream_shards is not None
    dataset = _open_stream(config) if streams else _prepare(config)
    position = RunFolder(Path(config.run.dir)).newest_position()
    if position is None and config.run.init_from is not None:
        check_initial_tokenizer(config, dataset.tokenizer())
    trained_on = position["data_hash"] if position else dataset.hash
    if trained_on != dataset.hash:
        place = "data.sources names" if streams else f"{config.data.folder} holds"
        raise RunFolderError(
            f"{place} other tokens (hash {dataset.hash[:12]}) than the run in "
            f"{config.run.dir} was trained on ({trained_on[:12]}): restore them, or use another "
            "run.name"
        )
    return dataset


def needs_preparation(config: JobConfig) -> bool:
    """Whether the first run with this configuration would prepare its data."""
    from data.manifest import MANIFEST_FILE

    streams = config.data.stream_shards is not None
    return not streams and not (Path(config.data.folder) / MANIFEST_FILE).exists()


def _open_stream(config: JobConfig) -> "StreamDataset":
    """A dataset with files for every lane; every process looks for itself."""
    from data.stream import StreamDataset

    dataset = StreamDataset.open(config.data, config.tokenizer)
    processes, _ = plan_processes(config.parallel)
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    dataset.check(config.train.global_batch_size, mesh.dp)
    return dataset


def _prepare(config: JobConfig) -> "Dataset":
    """The shards, prepared and packed where they are not yet; by the first process, others wait."""
    from data.dataset import Dataset
    from data.manifest import Manifest
    from data.packing import pack, wait_until_packed
    from data.prepare import prepare, wait_until_prepared

    folder, data = Path(config.data.folder), config.data

    def check(manifest: Manifest) -> None:
        _check_size(Dataset(folder, manifest, data.document_mask), config)

    if is_first_process():
        prepare(data, config.tokenizer, progress=True, check=check)
    else:
        wait_until_prepared(folder)
    for seq_len in sorted({stage.seq_len for stage in config.stages().all}) if data.packing else []:
        if is_first_process():
            pack(folder, seq_len, progress=True)
        else:
            wait_until_packed(folder, seq_len)
    dataset = Dataset.open(folder, data.document_mask, data.packing, data.verify_reads)
    _check_size(dataset, config)
    return dataset


def _check_size(dataset: "Dataset", config: JobConfig) -> None:
    """Raises DataError for tokens that are too few, or another vocabulary's."""
    dataset.check(config.stages(), config.model.vocab_size)
    if config.validation.samples and not dataset.n_held_out(config.train.seq_len):
        raise DataError(
            f"data.validation_fraction ({config.data.validation_fraction}) held out no window of "
            f"train.seq_len ({config.train.seq_len}) tokens: use a larger fraction (and another "
            "data.folder, where this one is prepared), or train without validation by "
            "validation.samples=0"
        )
