"""Inspection of a run: its dataset, and the sample that it trains on at a given position.

`data.inspection` reads and prints both. Here the run folder provides everything that determines
the sample.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.errors import DataError
from data.inspection import show_dataset, show_sample, stdout_console
from data.manifest import MANIFEST_FILE
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.config_validation import ConfigError


def inspect_run(run: RunFolder, sample: int, load: Callable[[dict[str, Any]], JobConfig]) -> None:
    """Print the dataset of a run, and the sample with index `sample` in its sample order.

    Args:
        load: Function that validates the values of `config.yaml`.

    Raises:
        DataError: The run's configuration or data is missing, damaged or not the trained one.
    """
    config = _read_config(run, load)
    data, folder = config.data, Path(config.data.folder)
    if not (folder / MANIFEST_FILE).exists():
        raise DataError(
            f"inspect={run.path}: the run's data.folder={folder} has no prepared data; use the "
            "working directory in which the run was launched, or prepare the data again"
        )
    dataset = Dataset.open(folder, data.document_mask, data.packing)
    position = run.newest_position()
    if position and position["data_hash"] != dataset.hash:
        raise DataError(
            f"inspect={run.path}: data.folder={folder} has other tokens (hash "
            f"{dataset.hash[:12]}) than the run was trained on ({position['data_hash'][:12]}); "
            "restore them, or inspect the dataset folder itself"
        )
    console = stdout_console()
    show_dataset(console, folder, dataset.manifest)
    title, n_steps, seed = str(run.path), config.train.max_steps, config.run.seed
    stages = config.stages()
    show_sample(console, dataset, data, sample, stages, seed, title=title, n_steps=n_steps)


def _read_config(run: RunFolder, load: Callable[[dict[str, Any]], JobConfig]) -> JobConfig:
    """Return the configuration of a run that has shards."""
    try:
        config = load(run.read_config() or {})
    except ConfigError as error:
        raise DataError(
            f"inspect={run.path}: {run.config} is not a valid configuration of train.py:\n{error}"
        ) from None
    except RunFolderError as error:
        raise DataError(f"inspect={run.path}: {error}") from None
    if config.data.is_mock:
        raise DataError(
            f"inspect={run.path}: the run trains on data=mock, token ids without text; choose a "
            "run with prepared data"
        )
    if config.data.stream_shards is not None:
        raise DataError(
            f"inspect={run.path}: the run streams its data "
            f"(data.stream_shards={config.data.stream_shards}) and has no token shards; choose a "
            "run with prepared data"
        )
    return config
