"""Find the weights that a path names, detect their format by file names and open them."""

import difflib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from formats.config_json import read_json
from formats.errors import FormatError
from formats.file_names import CONFIG, FORMATS, PARAMS, PART, WEIGHT_FILES, Format
from resilience.processes import is_first_process
from resilience.run_folder import COMMITTED, checkpoints_in

if TYPE_CHECKING:
    from formats.weights import Weights

MAX_LISTED = 8  # file names listed in an error message


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


def check_path(path: Path) -> None:
    """Check by file names that a path names weights, without importing torch.

    Raises:
        FormatError: It does not exist or contains no weights.
    """
    path = path.expanduser()
    if detect_format(path) is None and not checkpoints_in(path):
        reject_adapter(path)
        # The reader of a folder that lacks files reports which.
        if not (path / CONFIG).exists() and not any(path.glob("consolidated.*.pth")):
            raise FormatError(_without_weights(path))


def find_checkpoint(path: Path, verify: bool = True) -> Path:
    """Return the folder with the weights that `path` names.

    For a run folder or its `checkpoints` folder that is the newest valid checkpoint. The first
    process verifies its hashes and prints which one it uses; the other processes skip checkpoints
    whose manifest is damaged, and adopt the choice of the first one in `agreed_weights`.

    Args:
        verify: False to skip only checkpoints with a damaged manifest, on all processes.

    Raises:
        FormatError: A run has no valid checkpoint.
    """
    path = path.expanduser()
    if detect_format(path) is not None or not (candidates := checkpoints_in(path)):
        return path
    from checkpoint.files import find_checkpoint_damage

    verify &= is_first_process()
    skipped = list[str]()
    for candidate in candidates:
        damage = find_checkpoint_damage(candidate, with_hashes=verify)
        if damage is None:
            if verify:
                for warning in skipped:
                    print(f"Warning: skipped damaged {warning}", file=sys.stderr)
                print(f"Using {candidate}", file=sys.stderr, flush=True)
            return candidate
        skipped.append(f"{candidate}: {damage}")
    raise FormatError(
        f"{path} has no valid checkpoint; restore one from a backup:\n  " + "\n  ".join(skipped)
    )


def open_weights(path: Path, verify: bool = True) -> "Weights":
    """Open the weights that a path names, in any format; no values are read yet.

    Args:
        path, verify: As for `find_checkpoint`.

    Raises:
        FormatError: The format is unknown, or the folder is incomplete or damaged.
    """
    check_path(path)
    folder = find_checkpoint(path, verify)
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
    if format == "hf" or (format is None and has_config):
        from formats.hugging_face import open_hugging_face

        return open_hugging_face(folder)
    from formats.meta import open_meta

    return open_meta(folder)


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


def agreed_weights(path: Path, opened: "Weights | None" = None) -> "Weights":
    """Open the weights that rank 0 finds at a path, on all ranks; a collective call.

    Ranks that look at the folder of a run in progress may otherwise find different checkpoints.

    Args:
        opened: Weights that this rank has opened, kept if they are those of rank 0.

    Raises:
        FormatError: As `open_weights`.
    """
    from checkpoint.writer import on_rank_0

    def found() -> str:
        return str(find_checkpoint(path) if opened is None else opened.folder)

    folder = Path(on_rank_0(found, lambda error: error, catch=(FormatError,)))
    return opened if opened is not None and opened.folder == folder else open_weights(folder)


EXPECTED = (
    "use a run folder like runs/NAME, one of its checkpoints (with COMMITTED), a Hugging Face "
    "folder (config.json and safetensors files), or a Meta folder (params.json and "
    "consolidated.00.pth)"
)


def hub_remedy(path: Path) -> str:
    """Return how to download a path that is the name of a repository of the hub, else no text."""
    if (
        path.parent.exists()
        or path.parts[0] == "runs"
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
    ):
        return ""
    return f", or download it from the hub: hf download {path} --local-dir {path.name}"


def _without_weights(path: Path) -> str:
    """Return an error message for a path without weights: what was found, and what is expected."""
    try:
        found = sorted(each.name for each in path.iterdir())
    except PermissionError as error:
        return f"{path} cannot be read ({error.strerror}); fix its permissions"
    except OSError:
        found = []
    if path.suffix == ".gguf" or any(name.endswith(".gguf") for name in found):
        return (
            f"{path} is in GGUF format, which is not supported; use the weights from which it was "
            f"made: a {' or a '.join(FORMATS.values())}"
        )
    if path.is_file():
        return f"{path} is a file; use its folder {path.parent}, if it contains all weights"
    if not path.is_dir():
        parent = next(each for each in path.absolute().parents if each.is_dir())
        names = [each.name for each in sorted(parent.iterdir()) if each.is_dir()]
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; {EXPECTED}{hub_remedy(path)}"
        if near:
            hint = f". Did you mean {path.parent / near[0]}?"
        return f"{path} is not a folder" + hint
    # Published repositories have Meta's files in `original`, a hub cache revisions in `snapshots`.
    folders = [path / name for name in found] + sorted(path.glob("snapshots/*"))
    below = [each for each in folders if detect_format(each) or checkpoints_in(each)]
    if len(below) == 1:
        return f"{path} contains no weights, but {below[0]} does; use {below[0]}"
    if below:
        listed = ", ".join(str(each) for each in below[:MAX_LISTED])
        return f"{path} contains no weights, but its subfolders do; use one of {listed}"
    if "consolidated.safetensors" in found:
        return (
            f"{path}: consolidated.safetensors is not supported; use {PARAMS} with "
            f"consolidated.00.pth (Meta), or {CONFIG} with model.safetensors (Hugging Face)"
        )
    shown = ", ".join(found[:MAX_LISTED]) + (", …" if len(found) > MAX_LISTED else "")
    if (path / "checkpoints").is_dir() or "config.yaml" in found:
        return (
            f"{path} is a run folder without a committed checkpoint (found: {shown}); wait for its "
            f"first checkpoint, or if it is not running, python train.py run.dir={path} starts it "
            "again"
        )
    return f"{path} contains no weights (found: {shown or 'no files'}); {EXPECTED}"
