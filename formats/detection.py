"""Detect the format of a folder of weights by its file names and open it."""

from pathlib import Path

from formats.errors import FormatError
from formats.hugging_face import CONFIG, INDEX, SINGLE, open_hugging_face
from formats.meta import PARAMS, PART, open_meta
from formats.weights import FORMATS, Format, Weights
from resilience.run_folder import COMMITTED


def detect_format(folder: Path) -> Format | None:
    """Return the format of a folder, or None if it holds no complete set of weights."""
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return None
    if COMMITTED in names:
        return "native"
    if PARAMS in names and any(PART.fullmatch(name) for name in names):
        return "meta"
    return "hf" if CONFIG in names and names & {INDEX, SINGLE} else None


def open_weights(folder: Path) -> Weights:
    """Open a folder of weights in any format; no values are read yet.

    Raises:
        FormatError: The format is unknown, or the folder is incomplete or damaged.
    """
    format = detect_format(folder)
    if format == "native":
        from formats.native import open_native

        return open_native(folder)
    # The reader of a folder that lacks files reports which.
    if format == "hf" or (format is None and (folder / CONFIG).exists()):
        return open_hugging_face(folder)
    if format == "meta" or any(folder.glob("consolidated.*.pth")):
        return open_meta(folder)
    if not folder.is_dir():
        kinds = " or a ".join(FORMATS.values())
        raise FormatError(f"{folder} is not a folder; use a folder with weights: a {kinds}")
    checkpoints = sorted(folder.glob("step-*/COMMITTED"))
    checkpoints += sorted(folder.glob("checkpoints/step-*/COMMITTED"))
    if checkpoints:
        raise FormatError(
            f"{folder} is a run folder; use one of its checkpoints, for example "
            f"{checkpoints[-1].parent}"
        )
    raise FormatError(
        f"{folder} contains no weights; use a folder with COMMITTED (native checkpoint), "
        "config.json and safetensors files (Hugging Face), or params.json and "
        "consolidated.00.pth (Meta)"
    )
