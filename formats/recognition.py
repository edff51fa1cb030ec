"""Which format a folder of weights has, told by the files in it."""

from pathlib import Path

from formats.errors import FormatError
from formats.hugging_face import CONFIG, INDEX, SINGLE, open_hugging_face
from formats.meta import PARAMS, PART, open_meta
from formats.weights import FORMATS, Format, Weights
from resilience.run_folder import COMMITTED


def recognise(folder: Path) -> Format | None:
    """The format of a folder, by the names in it; None where it has none of ours."""
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
    """Opens a folder of weights, whichever its format; reads no values yet.

    Raises:
        FormatError: it has no format of ours, is incomplete or damaged.
    """
    kind = recognise(folder) or _incomplete(folder)
    if kind == "native":
        from formats.native import open_native

        return open_native(folder)
    if kind is not None:
        return open_hugging_face(folder) if kind == "hf" else open_meta(folder)
    told = " or a ".join(FORMATS.values())
    if not folder.is_dir():
        raise FormatError(f"{folder} is no folder: name one with weights, a {told}")
    if (checkpoints := _checkpoints_in(folder)) is not None:
        raise FormatError(f"{folder} is a run's folder: name a checkpoint in it, as {checkpoints}")
    raise FormatError(
        f"{folder} holds no weights: name a folder with COMMITTED (a checkpoint of ours), with "
        "config.json and safetensors (Hugging Face), or with params.json and consolidated.00.pth "
        "(Meta)"
    )


def _incomplete(folder: Path) -> Format | None:
    """The format of a folder that lacks files, so that its reader can tell which."""
    if (folder / CONFIG).exists():
        return "hf"
    return "meta" if any(folder.glob("consolidated.*.pth")) else None


def _checkpoints_in(folder: Path) -> Path | None:
    """The newest checkpoint of a run's folder, where it is one."""
    found = sorted(folder.glob("step-*/COMMITTED")) + sorted(
        folder.glob("checkpoints/step-*/COMMITTED")
    )
    return found[-1].parent if found else None
