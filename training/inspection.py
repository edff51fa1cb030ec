"""`prepare.py inspect=…`: whose data is shown, and with what it is read.

A run's folder tells all that decides its samples; for a dataset's folder the command does, and
what it leaves open is assumed and told. What is shown is `data.inspection_report`'s.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from cli.config import load_train_config
from data.config import DataConfig, PrepareJobConfig
from data.dataset import Dataset
from data.errors import DataError
from data.inspection import read_sample
from data.inspection_report import Reading, show_dataset, show_sample, stdout_console
from data.manifest import MANIFEST_FILE
from data.stages import Stage, Stages
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.config_validation import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

SEQ_LEN, SEED = 256, 0  # of `train.py` too


def inspect(config: PrepareJobConfig) -> None:
    """Shows the folder `config.inspect` on standard output.

    Raises:
        ConfigError: keys that a run's folder decides.
        DataError: no such folder, or its data is gone or damaged.
    """
    folder = Path(config.inspect or "")
    run = RunFolder(folder)
    if run.config.exists():
        _refuse_given(config)
        _inspect_run(run, config.sample)
    elif (folder / MANIFEST_FILE).exists():
        _inspect_dataset(folder, config)
    else:
        what = "holds" if folder.is_dir() else "is no folder, so it holds"
        raise DataError(
            f"inspect ({folder}) {what} neither a run's {run.config.name} nor a dataset's "
            f"{MANIFEST_FILE}: name a folder like runs/NAME or shards/NAME"
        )


def _refuse_given(config: PrepareJobConfig) -> None:
    """Raises ConfigError for what the command cannot decide about a run."""
    given = {"seq_len": config.seq_len, "seed": config.seed}
    problems = [
        f"{key} ({value}) is decided by the run in {config.inspect}: leave it out, or name its "
        "dataset's folder"
        for key, value in given.items()
        if value is not None
    ]
    if problems:
        raise ConfigError(problems)


def _inspect_run(run: RunFolder, number: int) -> None:
    """Shows a run's dataset, and the sample that the run trains on as its `number`-th."""
    trained = _read_run(run)
    data, folder = trained.data, Path(trained.data.folder)
    if not (folder / MANIFEST_FILE).exists():
        raise DataError(
            f"inspect ({run.path}): the run's data.folder ({folder}) holds no prepared data: start "
            "from the folder in which the run was started, or prepare the data again"
        )
    dataset = Dataset.open(folder, data.document_mask, data.packing)
    position = run.newest_position()
    if position and position["data_hash"] != dataset.hash:
        raise DataError(
            f"inspect ({run.path}): data.folder ({folder}) holds other tokens (hash "
            f"{dataset.hash[:12]}) than the run was trained on ({position['data_hash'][:12]}): "
            "restore them, or inspect the folder itself"
        )
    console = stdout_console()
    show_dataset(console, folder, dataset.manifest)
    read = _Read(str(run.path), trained.stages(), trained.run.seed, trained.train.max_steps, [])
    _show_sample(console, dataset, data, number, read)


def _read_run(run: RunFolder) -> JobConfig:
    """The configuration of a run that has shards."""
    try:
        trained = load_train_config(OmegaConf.create(run.read_config() or {}))
    except ConfigError as error:
        raise DataError(
            f"inspect ({run.path}): {run.config} is not a configuration of this program's runs:\n"
            f"{error}"
        ) from None
    except RunFolderError as error:
        raise DataError(f"inspect ({run.path}): {error}") from None
    if trained.data.stream_shards is not None:
        raise DataError(
            f"inspect ({run.path}): the run reads a stream (data.stream_shards "
            f"{trained.data.stream_shards}) and has no shards: name a run with prepared data"
        )
    return trained


def _inspect_dataset(folder: Path, config: PrepareJobConfig) -> None:
    """Shows a dataset, and a sample of the run that the command's keys and assumptions describe."""
    data = config.data
    dataset = Dataset.open(folder, data.document_mask, data.packing)
    assumed = []
    if config.seq_len is None:
        assumed.append("seq_len")
    if config.seed is None:
        assumed.append("seed")
    weights = dict.fromkeys(dataset.train, 1.0)
    if set(data.sources) == set(weights):
        weights = {name: data.sources[name].weight for name in weights}
    elif len(weights) > 1:
        assumed.append("weights (of data.sources)")
    seq_len = SEQ_LEN if config.seq_len is None else config.seq_len
    if data.stages:
        assumed.append("no data.stages")
    console = stdout_console()
    show_dataset(console, folder, dataset.manifest)
    for name, stream in dataset.train.items():
        if weights[name] and not data.packing and not stream.n_windows(seq_len):
            raise DataError(
                f"seq_len ({seq_len}) is too long for {name}, which has {stream.n_tokens:,} tokens "
                f"to train on: use at most {max(stream.n_tokens - 1, 1)}"
            )
    stages = Stages([Stage(0, 0, 0, seq_len, 1, None, weights)])
    seed = SEED if config.seed is None else config.seed
    read = _Read(str(folder), stages, seed, None, assumed)
    _show_sample(console, dataset, data, config.sample, read)


@dataclass(frozen=True)
class _Read:
    """Whose samples are read and how; `n_steps` is None and some is assumed where no run tells."""

    title: str
    stages: Stages
    seed: int
    n_steps: int | None
    assumed: list[str]


def _show_sample(
    console: "Console", dataset: Dataset, data: DataConfig, number: int, read: _Read
) -> None:
    """Shows one sample, with all that decides which it is."""
    blocks = data.shuffle_block_tokens
    sample = read_sample(dataset, read.stages, number, seed=read.seed, shuffle_block_tokens=blocks)
    values = {
        "seed": read.seed,
        "seq_len": sample.stage.seq_len,
        "weights": dict(sample.stage.weights),
        "document_mask": data.document_mask,
        "packing": data.packing,
        "shuffle_block_tokens": blocks,
    }
    reading = Reading(read.title, read.n_steps, values, read.assumed)
    show_sample(console, sample, dataset.tokenizer(), reading)
