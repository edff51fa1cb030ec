"""Convert weights between native checkpoints, Hugging Face folders and Meta folders.

    python convert.py checkpoint=runs/llama3_tiny target=llama3_tiny_hf
    python convert.py checkpoint=Llama-3.1-8B target=llama3_1_8b format=native
    python convert.py checkpoint=Meta-Llama-3-70B target=one_part format=meta parts=1

`checkpoint` is a run folder (its newest valid checkpoint), one of its checkpoints, or a Hugging
Face or Meta folder; the format is detected. A failed or killed conversion leaves no target folder.
"""

import sys
import time
from pathlib import Path

from cli.composition import compose_config
from cli.config import load_convert_config
from cli.errors import exit_on_user_error
from cli.start_up import start_up
from formats.config import ConvertJobConfig


def main(arguments: list[str]) -> None:
    """Load the configuration and convert; user errors exit with a message."""
    with exit_on_user_error():
        run(load_convert_config(compose_config("convert", arguments)))


def run(config: ConvertJobConfig) -> None:
    """Convert and print a summary.

    Raises:
        FormatError: The source cannot be read or the target cannot be written.
    """
    from formats.detection import check_path, open_weights
    from formats.output_folder import check_target
    from resilience.run_folder import checkpoints_in

    checkpoint, target = Path(config.checkpoint).expanduser(), Path(config.target)
    check_path(checkpoint)  # before the slow imports, and before hashes are verified
    check_target(target, config.overwrite, next(iter(checkpoints_in(checkpoint)), checkpoint))
    from data.tokenizer_files import find_tokenizer_file
    from formats.config_json import meta_rope_warning
    from formats.conversion import convert
    from formats.errors import FormatError
    from formats.file_names import FORMATS
    from formats.stored_tensor import DTYPES
    from formats.tokenizers import resolve_tokenizer
    from resilience.host_memory import return_freed_memory

    return_freed_memory()
    weights = open_weights(checkpoint)
    for warning in weights.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    format = config.format or ("hf" if weights.format == "native" else "native")
    or_none = ", or tokenizer_path=null to write none"
    if format == "meta" and (rope_warning := meta_rope_warning(weights.model)):
        print(f"Warning: {rope_warning}", file=sys.stderr)
    keep_tokenizer = False
    try:
        tokenizer = resolve_tokenizer(weights.folder, config.tokenizer_path, or_none)
    except FormatError as error:
        # Hugging Face's own files need not be understood to be copied.
        keep_tokenizer = weights.format == format == "hf" and config.tokenizer_path == "auto"
        if not keep_tokenizer or find_tokenizer_file(weights.folder) is None:
            raise
        tokenizer = None
        print(f"Warning: {error}. Its files are copied unchanged", file=sys.stderr)
    start = time.perf_counter()
    n_bytes = convert(
        weights,
        tokenizer,
        target,
        format,
        dtype=None if config.dtype is None else DTYPES[config.dtype],
        parts=config.parts,
        file_bytes=int(config.file_gb * 1e9),
        overwrite=config.overwrite,
        keep_tokenizer=keep_tokenizer,
    )
    seconds = time.perf_counter() - start
    print(
        f"{target}: {FORMATS[format]}, {n_bytes / 1e6:,.1f} MB in {seconds:,.1f} s, "
        f"converted from {FORMATS[weights.format]} {weights.folder}"
    )


if __name__ == "__main__":
    start_up()
    main(sys.argv[1:])
