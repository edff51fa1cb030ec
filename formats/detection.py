"""Detect the format of a folder of weights by its file names and open it."""

from pathlib import Path

from formats.config_json import read_json
from formats.errors import FormatError
from formats.hugging_face import CONFIG, open_hugging_face
from formats.hugging_face_files import WEIGHT_FILES
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
    return "hf" if CONFIG in names and names & set(WEIGHT_FILES) else None


def open_weights(folder: Path) -> Weights:
    """Open a folder of weights in any format; no values are read yet.

    Raises:
        FormatError: The format is unknown, or the folder is incomplete or damaged.
    """
    format = detect_format(folder)
    if format == "native":
        from formats.native import open_native

        return open_native(folder)
    reject_adapter(folder)
    has_config = (folder / CONFIG).exists()
    if format == "meta" and has_config and any((folder / name).exists() for name in WEIGHT_FILES):
        raise FormatError(
            f"{folder} contains weights in two formats, {CONFIG} with Hugging Face files and "
            f"{PARAMS} with consolidated.NN.pth; move one of them to another folder"
        )
    # The reader of a folder that lacks files reports which.
    if format == "hf" or (format is None and has_config):
        return open_hugging_face(folder)
    if format == "meta" or any(folder.glob("consolidated.*.pth")):
        return open_meta(folder)
    raise FormatError(_without_weights(folder))


def reject_adapter(folder: Path) -> None:
    """Reject a LoRA adapter, with which transformers modifies the weights of another folder.

    Raises:
        FormatError: The folder contains one.
    """
    path = folder / "adapter_config.json"
    if path.exists():
        values = read_json(path)
        kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
        raise FormatError(
            f"{path}: peft_type={kind} is an adapter of base_model_name_or_path={base}, not a "
            "model; merge it with peft (AutoPeftModelForCausalLM.from_pretrained(folder)"
            ".merge_and_unload().save_pretrained(target)) and use the merged folder"
        )


def _without_weights(folder: Path) -> str:
    """Return the error for a path without weights in a known format."""
    kinds = " or a ".join(FORMATS.values())
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        return (
            f"{folder} is in GGUF format, which is not supported; use the weights from which it "
            f"was made: a {kinds}"
        )
    if folder.is_file():
        return f"{folder} is a file; use its folder {folder.parent}, which must be a {kinds}"
    if not folder.is_dir():
        return f"{folder} is not a folder; use a folder with weights: a {kinds}"
    checkpoints = sorted(folder.glob("step-*/COMMITTED"))
    checkpoints += sorted(folder.glob("checkpoints/step-*/COMMITTED"))
    if checkpoints:
        return (
            f"{folder} is a run folder; use one of its checkpoints, for example "
            f"{checkpoints[-1].parent}"
        )
    # Published repositories have Meta's files in `original`, a hub cache revisions in `snapshots`.
    for inner in (folder / "original", *sorted(folder.glob("snapshots/*"))):
        if detect_format(inner):
            return f"{folder} contains no weights, but {inner} does; use {inner}"
    if (folder / "consolidated.safetensors").exists():
        return (
            f"{folder}: consolidated.safetensors is not supported; use {PARAMS} with "
            f"consolidated.00.pth (Meta), or {CONFIG} with model.safetensors (Hugging Face)"
        )
    return (
        f"{folder} contains no weights; use a folder with COMMITTED (native checkpoint), "
        "config.json and safetensors files (Hugging Face), or params.json and "
        "consolidated.00.pth (Meta)"
    )
