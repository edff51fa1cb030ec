"""The folder that is written: whole under its name, or not there at all."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from made_weights import SMALL, MadeWeights, assert_same_weights
from torch import Tensor

from formats.conversion import convert
from formats.errors import FormatError
from formats.recognition import open_weights
from formats.weights import Format

FORMATS: tuple[Format, ...] = ("native", "hf", "meta")


@pytest.mark.parametrize("format", FORMATS)
def test_a_target_is_replaced_only_when_asked_and_only_if_it_is_weights(
    format: Format, tmp_path: Path
) -> None:
    made, target = MadeWeights(SMALL), tmp_path / "out"
    convert(made, None, target, format)
    with pytest.raises(FormatError, match="exists, and nothing is written over it: name another"):
        convert(made, None, target, format)
    for other in FORMATS:
        convert(made, None, target, other, overwrite=True)
        assert_same_weights(open_weights(target), made)
        assert os.listdir(tmp_path) == ["out"]
    shutil.rmtree(target)
    target.mkdir()
    (target / "thesis.tex").write_text("all of it")
    (target / "config.json").write_text("{}")  # which many a folder has
    with pytest.raises(FormatError, match="holds no weights, and overwrite=true replaces weights"):
        convert(made, None, target, format, overwrite=True)
    assert (target / "thesis.tex").exists()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FormatError, match="is a file or a link"):
        convert(made, None, tmp_path / "link", format, overwrite=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_of_a_checkpoint_goes_nowhere(format: Format, tmp_path: Path) -> None:
    convert(MadeWeights(SMALL), None, tmp_path / "source", "native")
    largest = max((tmp_path / "source").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(FormatError, match=f"is damaged: the hash of {largest.name}"):
        convert(open_weights(tmp_path / "source"), None, tmp_path / "out", format)
    assert os.listdir(tmp_path) == ["source"]


class FailingWeights(MadeWeights):
    """Whose last tensor cannot be read."""

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        if name == "output.weight":
            raise FormatError("the disk is gone")
        return super().read(name, offsets, sizes)


@pytest.mark.parametrize("format", FORMATS)
def test_a_source_that_fails_half_way_leaves_nothing(format: Format, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the disk is gone"):
        convert(FailingWeights(SMALL), None, tmp_path / "out", format)
    assert os.listdir(tmp_path) == []
    # Nor does it take what was there.
    made = MadeWeights(SMALL)
    convert(made, None, tmp_path / "out", format)
    with pytest.raises(FormatError, match="the disk is gone"):
        convert(FailingWeights(SMALL), None, tmp_path / "out", format, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_weights(open_weights(tmp_path / "out"), made)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB, where the weights need 490."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system, and not everywhere")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_told_before_and_leaves_nothing_after(
    format: Format, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FormatError, match=r"needs 0.00 GB, and .* make room"):
        convert(MadeWeights(SMALL), None, small_disk / "out", format)
    assert os.listdir(small_disk) == []
    # Where another program fills it in the meantime.
    monkeypatch.setattr("formats.conversion.check_room", lambda target, needed: None)
    with pytest.raises(FormatError, match=r"target \(.*out\) cannot be written \(.*\): make room"):
        convert(MadeWeights(SMALL), None, small_disk / "out", format)
    assert os.listdir(small_disk) == []


SLOW = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from made_weights import SMALL, MadeWeights
from formats.conversion import convert
class Waiting(MadeWeights):
    def read(self, name, offsets, sizes):
        if name == "norm.weight":
            print("half-way", flush=True)
            sys.stdin.read()
        return super().read(name, offsets, sizes)
convert(Waiting(SMALL), None, Path({target!r}), "hf")
"""


def test_a_killed_conversion_leaves_no_target_and_the_next_one_clears_up(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    target = tmp_path / "out"
    code = SLOW.format(paths=[str(root), str(root / "tests")], target=str(target))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half-way\n"
    (hidden,) = tmp_path.iterdir()
    assert hidden.name.startswith(".out-")
    made = MadeWeights(SMALL)
    convert(made, None, target, "native")  # another one to the same name, at the same time
    assert hidden.exists(), "it is at work"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [hidden.name, "out"]
    convert(made, None, target, "hf", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_weights(open_weights(target), made)


def test_what_holds_no_weights_is_told_with_what_would(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match="is no folder: name one with weights, a checkpoint or a Hugging"
    ):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="holds no weights: name a folder with COMMITTED"):
        open_weights(tmp_path)
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    step.parent.mkdir(parents=True)
    convert(MadeWeights(SMALL), None, step, "native")
    with pytest.raises(FormatError, match=r"is a run's folder: name a checkpoint in it, as .*02"):
        open_weights(tmp_path / "run")
