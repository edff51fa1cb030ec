"""What `checkpoint=` may name: a run, its checkpoints, one of them, or other weights."""

import os
import shutil
from pathlib import Path

import pytest
from random_weights import SMALL, RandomWeights, assert_same_weights

from formats.conversion import convert
from formats.detection import check_path, find_checkpoint, open_weights
from formats.errors import FormatError
from resilience.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with two checkpoints and what an interrupted save leaves."""
    run = RunFolder(tmp_path / "runs" / "books")
    run.checkpoints.mkdir(parents=True)
    for step in (2, 16):
        convert(RandomWeights(SMALL), None, run.step_folder(step), "native")
    (run.checkpoints / "step-00000020").mkdir()
    (run.checkpoints / "step-00000030.damaged-1a2b3c4d").mkdir()
    return run


def test_run_folder_names_its_newest_valid_checkpoint(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run.step_folder(16)
    (run.path.parent / "latest").symlink_to("books")
    for name in (run.path, run.checkpoints, newest, Path(f"{run.path}/"), newest / "."):
        assert open_weights(name).folder == newest
    assert open_weights(run.path.parent / "latest").folder.resolve() == newest
    assert capsys.readouterr().err.count(f"Using {newest}\n") == 3
    monkeypatch.chdir(run.path.parent)
    step = "books/checkpoints/step-00000002"
    assert open_weights(Path("books")).folder == Path("books/checkpoints/step-00000016")
    assert open_weights(Path(step)).folder == Path(step)
    monkeypatch.chdir(run.path)
    assert open_weights(Path(".")).folder == Path("checkpoints/step-00000016")
    assert_same_weights(open_weights(Path(".")), RandomWeights(SMALL))


@pytest.mark.parametrize("kind", ["byte", "truncated", "absent", "manifest"])
def test_damaged_newest_checkpoint_is_skipped_with_a_warning(
    run: RunFolder, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run.step_folder(16)
    file = next(newest.glob("*.distcp")) if kind != "manifest" else newest / "manifest.json"
    content = bytearray(file.read_bytes())
    if kind == "truncated":
        os.truncate(file, len(content) - 1)
    elif kind == "absent":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert find_checkpoint(run.path) == run.step_folder(2)
    error = capsys.readouterr().err
    assert f"Warning: skipped damaged {newest}: " in error and file.name in error
    assert f"Using {run.step_folder(2)}\n" in error
    assert newest.exists()  # a reader renames nothing
    (run.step_folder(2) / "manifest.json").unlink()
    with pytest.raises(
        FormatError, match="has no valid checkpoint; restore one from a backup:\n  "
    ):
        find_checkpoint(run.path)


def test_path_without_weights_is_rejected_with_what_was_found(
    run: RunFolder, tmp_path: Path
) -> None:
    def error_of(path: Path) -> str:
        with pytest.raises(FormatError) as error:
            open_weights(path)
        return str(error.value)

    expected = "use a run folder like runs/NAME, one of its checkpoints (with COMMITTED), a Hugging"
    assert f"x/y is not a folder; {expected}" in error_of(tmp_path / "x" / "y")
    assert f"is not a folder. Did you mean {run.path}?" in error_of(run.path.with_name("boks"))
    assert f"contains no weights, but {run.path} does; use {run.path}" in error_of(run.path.parent)
    file = run.step_folder(2) / "manifest.json"
    assert f"is a file; use its folder {file.parent}" in error_of(file)
    open_weights(file.parent)  # the remedy
    (tmp_path / "other").mkdir()
    assert f"(found: no files); {expected}" in error_of(tmp_path / "other")
    (tmp_path / "other" / "a.bin").write_text("")
    assert f"(found: a.bin); {expected}" in error_of(tmp_path / "other")
    shutil.rmtree(run.step_folder(2))
    shutil.rmtree(run.step_folder(16))
    error = error_of(run.path)
    assert "is a run folder without a committed checkpoint (found: checkpoints)" in error
    assert f"python train.py run.dir={run.path} starts it again" in error


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("Org/Llama-3", "or download it from the hub: hf download Org/Llama-3 --local-dir Llama-3"),
        ("runs/bokos", "Did you mean runs/books?"),
        ("runs/unlike", "or a Meta folder (params.json and consolidated.00.pth)"),
    ],
)
def test_path_without_weights_is_reported_with_a_remedy(
    run: RunFolder, path: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent.parent)
    with pytest.raises(FormatError) as error:
        check_path(Path(path))
    assert str(error.value).endswith(remedy)
    check_path(Path("runs/books"))
    check_path(Path("runs/books/checkpoints/step-00000002"))
