"""Checks of run folder and data before any process is launched, and the preparation of data.

Each check raises an error with key, value, rule and remedy. The checks of the configuration itself
are in `training.config_rules`.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError
from parallel.mesh import resolve_mesh
from resilience.accelerator import resolve_processes
from resilience.config import preflight_seconds
from resilience.exit_codes import ExitCode
from resilience.exit_timer import exit_if_late
from resilience.lock import RunLock, acquire_lock, check_not_locked
from resilience.processes import is_first_process
from resilience.run_folder import RunFolder, RunFolderError
from resilience.run_identity import check_identity
from resilience.slurm import host_name
from training.config import JobConfig
from training.config_validation import plain
from training.initial_weights import check_initial_tokenizer, check_initial_weights
from training.resume_policy import Changes, with_defaults
from training.run_folder_check import check_run_folder, checkpoint_warnings

if TYPE_CHECKING:
    from data.dataset import Dataset, WindowDataset
    from data.stream import StreamDataset


def check_folder(config: JobConfig) -> Changes:
    """Return the configuration changes since the previous launch of the run.

    Raises:
        LockedError: Another run holds the folder.
        RunFolderError: The run may not start or resume in its folder.
        FormatError, ConfigError: The initial weights cannot be read or do not fit the model.
    """
    folder = RunFolder(Path(config.run.dir))
    with _limited(config, "reading"):
        if is_first_process():
            check_not_locked(folder)
        check_identity(folder, config.run.adopt)
        changes = check_run_folder(folder, plain(config), lambda old: with_defaults(old, config))
        if is_first_process():
            for message in checkpoint_warnings(folder):
                print(f"Warning: {message}", file=sys.stderr, flush=True)
        if config.run.init_from is not None and not folder.committed_steps():
            check_initial_weights(config.run, config.model)
    return changes


def _limited(config: JobConfig, activity: str) -> AbstractContextManager[None]:
    """Return a context that exits if the run folder does not answer in time."""
    seconds = preflight_seconds(config.watchdog.setup_seconds)
    named = f"{activity} run.dir={config.run.dir} on {host_name()}"
    return exit_if_late(named, seconds, ExitCode.RANK_FAILED_BEFORE_SAVE)


def acquire_run_lock(config: JobConfig) -> RunLock | None:
    """Acquire the lock of the run folder on the first process; return None elsewhere.

    Raises:
        LockedError: Another run holds the folder.
        RunFolderError: The folder is not writable.
    """
    if not is_first_process():
        return None
    folder = RunFolder(Path(config.run.dir))
    with _limited(config, "locking"):
        return acquire_lock(folder, lambda message: print(message, flush=True))


@contextmanager
def abandoned_on_error(lock: RunLock | None) -> Iterator[None]:
    """Leave neither a lock nor an empty run folder if the launch fails."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.abandon()
        raise


def prepare_data(config: JobConfig) -> "WindowDataset | StreamDataset":
    """Return the dataset; on first use the first process prepares it while the others wait.

    Raises:
        DataError: The data cannot be prepared or read, or is too small.
        RunFolderError: The newest checkpoint of the run was trained on other tokens.
    """
    position = RunFolder(Path(config.run.dir)).newest_position()
    trained_on = position["data_hash"] if position else None
    if position is None and config.run.init_from is not None and needs_preparation(config):
        from data.tokenizer import ready_tokenizer

        check_initial_tokenizer(config, ready_tokenizer(config.tokenizer))
    dataset = _open(config, trained_on)
    if position is None and config.run.init_from is not None and not config.data.is_mock:
        check_initial_tokenizer(config, dataset.tokenizer())
    if trained_on not in (None, dataset.hash):
        is_prepared = config.data.stream_shards is None and not config.data.is_mock
        origin = f"data.folder={config.data.folder}" if is_prepared else "data.sources"
        raise RunFolderError(
            f"{origin} has other tokens ({dataset.hash[:12]}) than the run in {config.run.dir} "
            f"was trained on ({trained_on[:12]}); restore them or use another run.dir"
        )
    return dataset


def needs_preparation(config: JobConfig) -> bool:
    """Return whether a launch with this configuration would have to prepare its data."""
    from data.manifest import MANIFEST_FILE

    reads_shards = config.data.stream_shards is None and not config.data.is_mock
    return reads_shards and not (Path(config.data.folder) / MANIFEST_FILE).exists()


def _open(config: JobConfig, trained_on: str | None) -> "WindowDataset | StreamDataset":
    if config.data.is_mock:
        from data.mock import MockDataset

        (name,) = config.data.sources
        return MockDataset(name, config.model.vocab_size, config.data.document_mask)
    if config.data.stream_shards is not None:
        return _open_stream(config, trained_on)
    return _prepare(config, trained_on)


def _open_stream(config: JobConfig, trained_on: str | None) -> "StreamDataset":
    from data.stream import StreamDataset

    dataset = StreamDataset(config.data, config.tokenizer)
    processes, _ = resolve_processes(config.parallel)
    mesh, _ = resolve_mesh(config.parallel, processes.world_size)
    dataset.check(config.train.global_batch_size, mesh.dp)
    dataset.recognize(trained_on)
    return dataset


def _prepare(config: JobConfig, trained_on: str | None) -> "Dataset":
    from data.dataset import Dataset
    from data.manifest import Manifest
    from data.packing import pack, wait_until_packed
    from data.preparation.pipeline import prepare, wait_until_prepared

    folder, data = Path(config.data.folder), config.data

    def check(manifest: Manifest) -> None:
        _check_size(Dataset(folder, manifest, data.document_mask), config)

    if is_first_process():
        if trained_on and needs_preparation(config):
            _reject_other_corpus(config, trained_on)
        prepare(data, config.tokenizer, progress=True, check=check, trained_on=trained_on)
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


def _reject_other_corpus(config: JobConfig, trained_on: str) -> None:
    """Raise RunFolderError if the folder with the run's data shows that this is other data."""
    from data.manifest import MANIFEST_FILE
    from data.preparation.identity import read_prepared

    previous = RunFolder(Path(config.run.dir)).last_config() or {}
    folder = previous.get("data", {}).get("folder", "")
    if not (Path(folder) / MANIFEST_FILE).exists():
        return  # the tokens are compared after the preparation
    try:
        read_prepared(dataclasses.replace(config.data, folder=folder), config.tokenizer)
    except DataError as error:
        raise RunFolderError(
            f"The run in {config.run.dir} was trained on the data in {folder}, and this is other "
            f"data. Use data.folder={folder} to resume it, or another run.dir.\n{error}"
        ) from None


def _check_size(dataset: "Dataset", config: JobConfig) -> None:
    dataset.check(config.stages(), config.model.vocab_size)
    if config.validation.samples and not dataset.n_validation_windows(config.train.seq_len):
        raise DataError(_validation_error(dataset, config))


def _validation_error(dataset: "Dataset", config: JobConfig) -> str:
    """Return that validation has no window, and what holds out one."""
    from data.manifest import MANIFEST_FILE

    n_needed, fraction = config.train.seq_len + 1, config.data.validation_fraction
    n_tokens = max(dataset.manifest.n_tokens(source=name) for name in dataset.validation)
    enough = math.ceil(250 * n_needed / n_tokens) / 100  # hashes may hold out only half of it
    remedies = ["validation.samples=0"]
    if fraction < enough <= 0.5:
        prepared = (dataset.folder / MANIFEST_FILE).exists()
        folder = f" with data.folder={dataset.folder}-2" if prepared else ""
        remedies.insert(0, f"data.validation_fraction={enough:g}{folder}")
    n_held_out = max(stream.n_tokens for stream in dataset.validation.values())
    if n_held_out > 1:
        remedies.append(f"train.seq_len={n_held_out - 1} or less")
    return (
        f"data.validation_fraction={fraction} holds out {n_held_out:,} tokens of {dataset.folder}, "
        f"but a window of train.seq_len={config.train.seq_len} needs {n_needed:,}; add text, or "
        f"use {', '.join(remedies[:-1])}{' or ' if len(remedies) > 1 else ''}{remedies[-1]}"
    )
