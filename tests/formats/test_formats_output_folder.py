"""Output folders: complete under the target name, or absent."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from random_weights import SMALL, MemoryTensor, RandomWeights, assert_same_weights
from torch import Tensor

from formats.conversion import convert
from formats.detection import open_weights
from formats.errors import FormatError
from formats.file_names import Format
from formats.stored_tensor import Dims

FORMATS: tuple[Format, ...] = ("native", "hf", "meta")


@pytest.mark.parametrize("format", FORMATS)
def test_target_is_replaced_only_with_overwrite_and_only_if_it_contains_weights(
    format: Format, tmp_path: Path
) -> None:
    made, target = RandomWeights(SMALL), tmp_path / "out"
    convert(made, None, target, format)
    with pytest.raises(FormatError, match="exists; use another folder, or overwrite=true"):
        convert(made, None, target, format)
    for other in FORMATS:
        convert(made, None, target, other, overwrite=True)
        assert_same_weights(open_weights(target), made)
        assert os.listdir(tmp_path) == ["out"]
    shutil.rmtree(target)
    target.mkdir()
    (target / "thesis.tex").write_text("text")
    (target / "config.json").write_text("{}")  # a common file name
    with pytest.raises(
        FormatError, match="contains no weights, and overwrite=true only replaces weights"
    ):
        convert(made, None, target, format, overwrite=True)
    assert (target / "thesis.tex").exists()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FormatError, match="is a file or a symbolic link"):
        convert(made, None, tmp_path / "link", format, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("target", "relation"),
    [
        ("hub/original", "is"),
        ("hub/../hub/./original", "is"),
        ("link", "is"),
        ("hub", "contains"),
    ],
)
def test_target_must_not_be_the_source(
    target: str, relation: str, overwrite: bool, tmp_path: Path
) -> None:
    source = tmp_path / "hub" / "original"
    convert(RandomWeights(SMALL), None, source, "meta")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "hub" / file).touch()
    (tmp_path / "link").symlink_to(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FormatError) as error:
        convert(open_weights(source), None, tmp_path / target, "hf", overwrite=overwrite)
    assert f"{relation} the folder of the weights to convert, {source}" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("format", FORMATS)
def test_corrupted_checkpoint_is_not_converted(format: Format, tmp_path: Path) -> None:
    convert(RandomWeights(SMALL), None, tmp_path / "source", "native")
    largest = max((tmp_path / "source").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(FormatError, match=f"is damaged: the hash of {largest.name}"):
        convert(open_weights(tmp_path / "source"), None, tmp_path / "out", format)
    assert os.listdir(tmp_path) == ["source"]


class FailingTensor(MemoryTensor):
    def read(self, offsets: Dims = None, sizes: Dims = None) -> Tensor:
        raise FormatError("disk failure")


def failing_weights() -> RandomWeights:
    """Weights whose last tensor cannot be read."""
    made = RandomWeights(SMALL)
    last = made.values["output.weight"]
    failing = FailingTensor(last.dtype, tuple(last.shape), (), last)
    made.tensors = {**made.tensors, "output.weight": failing}
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_failed_conversion_leaves_no_files(format: Format, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="disk failure"):
        convert(failing_weights(), None, tmp_path / "out", format)
    assert os.listdir(tmp_path) == []
    # An existing target is kept.
    made = RandomWeights(SMALL)
    convert(made, None, tmp_path / "out", format)
    with pytest.raises(FormatError, match="disk failure"):
        convert(failing_weights(), None, tmp_path / "out", format, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_weights(open_weights(tmp_path / "out"), made)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB; the weights need 490 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system requires root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("format", FORMATS)
def test_full_disk_is_reported_and_leaves_no_files(
    format: Format, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FormatError, match=r"needs .* KiB, but .* KiB free; free space"):
        convert(RandomWeights(SMALL), None, small_disk / "out", format)
    assert os.listdir(small_disk) == []
    # Simulate another program filling the disk after the check.
    monkeypatch.setattr("formats.conversion.check_free_space", lambda target, n_bytes: None)
    with pytest.raises(FormatError, match=r"target=.*out cannot be written \(.*\); free space"):
        convert(RandomWeights(SMALL), None, small_disk / "out", format)
    assert os.listdir(small_disk) == []


SLOW = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from random_weights import SMALL, MemoryTensor, RandomWeights
from formats.conversion import convert
class Waiting(MemoryTensor):
    def read(self, offsets=None, sizes=None):
        print("halfway", flush=True)
        sys.stdin.read()
        return super().read(offsets, sizes)
made = RandomWeights(SMALL)
norm = made.values["norm.weight"]
made.tensors = made.tensors | {{"norm.weight": Waiting(norm.dtype, tuple(norm.shape), (), norm)}}
convert(made, None, Path({target!r}), "hf")
"""


def test_killed_conversion_leaves_no_target_and_the_next_one_deletes_its_files(
    tmp_path: Path,
) -> None:
    root = Path(__file__).parent.parent.parent
    target = tmp_path / "out"
    code = SLOW.format(paths=[str(root), str(root / "tests")], target=str(target))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    hidden, lock = sorted(tmp_path.iterdir())
    assert hidden.name.startswith(".out-") and lock.name == f"{hidden.name}.lock"
    made = RandomWeights(SMALL)
    convert(made, None, target, "native")  # a concurrent conversion to the same target
    assert hidden.exists(), "the folder of a running conversion was deleted"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [hidden.name, lock.name, "out"]
    convert(made, None, target, "hf", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_weights(open_weights(target), made)


@pytest.mark.parametrize("name", ["out", "out[1]*"])
def test_next_conversion_deletes_only_folders_with_the_lock_of_a_killed_one(
    tmp_path: Path, name: str
) -> None:
    def make(folder: str, lock: bool) -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
        if lock:
            (tmp_path / f"{folder}.lock").touch()

    make(f".{name}-0123abcd", lock=True)
    make(f".{name}-0123abcd.replaced", lock=False)  # killed while it replaced the target
    kept = {f".{name}-89abcdef": False, f".{name}-original": True, f".{name}x-0123abcd": True}
    for folder, lock in kept.items():
        make(folder, lock)
    convert(RandomWeights(SMALL), None, tmp_path / name, "native")
    locks = [f"{folder}.lock" for folder, lock in kept.items() if lock]
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, *locks, name])
