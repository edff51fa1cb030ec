"""Prepare a dataset: text → tokenizer (trained if necessary) → token shards in `data.folder`.

    python prepare.py data=text data.name=books data.sources.text.path=books/ tokenizer=bpe
    python prepare.py pack=8192        also write the index for packed windows
    python prepare.py verify=true      verify every byte of a prepared folder
    python prepare.py inspect=runs/llama3_tiny sample=100    print a run's data and one sample

`train.py` prepares its data on first use. A prepared folder is left unchanged.
"""

import sys
from pathlib import Path

from cli.composition import compose_config
from cli.config import load_prepare_config, load_train_config
from cli.errors import exit_on_user_error
from cli.start_up import start_up
from data.config import PrepareJobConfig
from data.errors import DataError
from resilience.run_folder import RunFolder
from training.config_validation import ConfigError


def main(arguments: list[str]) -> None:
    """Validate the configuration, then inspect, verify or prepare a folder."""
    with exit_on_user_error("Interrupted; run the same command to resume."):
        config = load_prepare_config(compose_config("prepare", arguments))
        # Imported here so that `--help` and configuration errors stay fast.
        if config.inspect is not None:
            inspect(config)
        elif config.verify:
            from data.verification import print_verification

            if not print_verification(Path(config.data.folder)):
                sys.exit(1)
        else:
            prepare_and_pack(config)


def inspect(config: PrepareJobConfig) -> None:
    """Print the dataset and a sample of a run folder or dataset folder."""
    from omegaconf import OmegaConf

    from data.inspection import inspect_dataset
    from data.manifest import MANIFEST_FILE
    from training.inspection import inspect_run

    folder = Path(config.inspect or "")
    run = RunFolder(folder)
    if run.config.exists():
        errors = [
            f"{key}={value} is determined by the run in {folder}; omit it, or inspect the run's "
            "dataset folder"
            for key in ("seq_len", "seed")
            if (value := getattr(config, key)) is not None
        ]
        if errors:
            raise ConfigError(errors)
        inspect_run(run, config.sample, lambda values: load_train_config(OmegaConf.create(values)))
    elif (folder / MANIFEST_FILE).exists():
        inspect_dataset(folder, config)
    else:
        reason = "contains" if folder.is_dir() else "is not a folder and contains"
        raise DataError(
            f"inspect={folder} {reason} neither {run.config.name} of a run nor {MANIFEST_FILE} of "
            "a dataset; use a folder like runs/NAME or shards/NAME"
        )


def prepare_and_pack(config: PrepareJobConfig) -> None:
    """Prepare and pack the dataset, and print its size."""
    from data.packing import pack
    from data.preparation.pipeline import prepare

    manifest = prepare(config.data, config.tokenizer, progress=True)
    for seq_len in config.lengths:
        pack(config.data.folder, seq_len, progress=True)
    print(
        f"{config.data.folder}: {manifest.n_tokens('train'):,} training and "
        f"{manifest.n_tokens('validation'):,} validation tokens, "
        f"vocabulary {manifest.tokenizer.vocab_size:,} ({manifest.tokenizer.name})"
    )
    if not manifest.n_tokens("validation"):
        fraction = config.data.validation_fraction
        print(
            f"Warning: data.validation_fraction={fraction} holds out no text, so train.py needs "
            "validation.samples=0; to hold out text, prepare with a larger fraction (and another "
            "data.folder), or add text",
            file=sys.stderr,
        )


if __name__ == "__main__":
    start_up()
    main(sys.argv[1:])
