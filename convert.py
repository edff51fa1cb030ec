"""Converts weights: our checkpoints ↔ Hugging Face folders ↔ Meta folders, tensor by tensor.

    python convert.py source=runs/llama3_tiny/checkpoints/step-00000160 target=llama3_tiny_hf
    python convert.py source=Llama-3.1-8B target=llama3_1_8b format=native
    python convert.py source=Meta-Llama-3-70B target=one_part format=meta parts=1

What the source is, its files tell. Nothing is left of a conversion that fails or is killed.
"""

import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from cli.arguments import hydra_arguments
from cli.config import load_convert_config
from cli.errors import exit_on_user_error
from formats.config import ConvertJobConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="convert")
def main(composed: DictConfig) -> None:
    """Checks the configuration, opens the source, writes the target."""
    with exit_on_user_error("Not converted"):
        run(load_convert_config(composed))


def run(config: ConvertJobConfig) -> None:
    """Converts, and tells what it did.

    Raises:
        FormatError: the source cannot be read, or the target not be written; nothing is left of it.
    """
    from evaluation.inference import tokenizer_of
    from formats.conversion import convert
    from formats.pieces import DTYPE_OF
    from formats.recognition import open_weights
    from formats.target import check_target
    from formats.weights import FORMATS
    from parallel.host_memory import give_freed_memory_back

    give_freed_memory_back()
    target = Path(config.target)
    check_target(target, config.overwrite)
    weights = open_weights(Path(config.source))
    kind = config.format or ("hf" if weights.format == "native" else "native")
    begin = time.perf_counter()
    n_bytes = convert(
        weights,
        tokenizer_of(weights, config.tokenizer_path),
        target,
        kind,
        dtype=None if config.dtype is None else DTYPE_OF[config.dtype],
        parts=config.parts,
        file_bytes=int(config.file_gb * 1e9),
        overwrite=config.overwrite,
    )
    seconds = time.perf_counter() - begin
    print(
        f"{target}: {FORMATS[kind]}, {n_bytes / 1e9:,.3f} GB in {seconds:,.1f} s, "
        f"from the {FORMATS[weights.format]} {weights.folder}"
    )


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "convert")
    main()
