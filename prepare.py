"""Prepares a dataset: text → tokenizer (trained where it must be) → token shards in `data.folder`.

    python prepare.py data=text data.name=books data.sources.text.path=books/ tokenizer=bpe
    python prepare.py pack=8192        and an index of windows that whole documents fill

`train.py` does the same on first use; a folder that is prepared already is left as it is.
"""

import sys

import hydra
from omegaconf import DictConfig

from data.errors import DataError
from program.config import ConfigError, hydra_arguments, load_prepare_config


@hydra.main(version_base="1.3", config_path="conf", config_name="prepare")
def main(composed: DictConfig) -> None:
    """Checks the configuration, prepares, and tells what the folder holds."""
    try:
        config = load_prepare_config(composed)
        # Imported here, so that `--help` and a wrong configuration answer at once.
        from data.packing import pack
        from data.prepare import prepare

        manifest = prepare(config.data, config.tokenizer, progress=True)
        for seq_len in config.lengths:
            pack(config.data.folder, seq_len, progress=True)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Stopped. What is done is kept: the same command goes on with it.", file=sys.stderr)
        sys.exit(130)
    print(
        f"{config.data.folder}: {manifest.n_tokens('train'):,} training and "
        f"{manifest.n_tokens('validation'):,} validation tokens, "
        f"vocabulary {manifest.tokenizer.vocab_size:,} ({manifest.tokenizer.name})"
    )


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "prepare")
    main()
