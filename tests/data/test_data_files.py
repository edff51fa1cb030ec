"""Writing files durably, and explaining why it failed."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from data import files
from data.files import (
    format_bytes,
    json_line,
    read_file,
    sync_folder,
    write_atomically,
    write_problem,
)


def failing_fsync(number: int) -> object:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_file_systems_that_cannot_sync_folders_are_tolerated_with_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", failing_fsync(number))
    files._warn_once.cache_clear()
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        sync_folder(tmp_path / name)
    (warning,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "a") in warning and os.strerror(number) in warning


def test_other_errors_of_syncing_a_folder_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing_fsync(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("target", ["pipe", "socket", "folder", "/dev/zero", "link", "absent"])
def test_only_regular_files_are_read(target: str, tmp_path: Path) -> None:
    """Reading a named pipe would block, and a device may never end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
    path = tmp_path / "link"
    path.symlink_to(target)
    with pytest.raises(OSError, match=r"not a regular file|Too many levels|No such file"):
        read_file(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named_with_folder_needed_and_free_bytes(number: int, tmp_path: Path) -> None:
    text = write_problem(OSError(number, os.strerror(number)), tmp_path / "absent", 2_500_000)
    assert text.startswith(f"{os.strerror(number)}: in {tmp_path / 'absent'} 2.4 MiB needed, ")
    assert text.endswith(" free")


def test_disk_without_free_inodes_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = os.statvfs_result((4096, 4096, 1000, 500, 500, 36, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    text = write_problem(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path)
    assert text.startswith(f"No space left on device: in {tmp_path} no inodes are free")


def test_library_error_on_a_full_disk_is_explained_by_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert "unexpected pos" in write_problem(error, tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda folder: 0)
    assert write_problem(error, tmp_path) == f"No space left on device: in {tmp_path} 0 bytes free"


def test_other_write_errors_keep_their_reason(tmp_path: Path) -> None:
    for number in (errno.EROFS, errno.EACCES):
        assert write_problem(OSError(number, os.strerror(number)), tmp_path) == os.strerror(number)
    too_large = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert "ulimit -f" in write_problem(too_large, tmp_path)


def test_failed_atomic_write_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", failing_fsync(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_sizes_have_the_unit_that_suits_them() -> None:
    sizes = [format_bytes(n) for n in (0, 999, 1500, 2_500_000, 3 * 10**12)]
    assert sizes == ["0 bytes", "999 bytes", "1.5 KiB", "2.4 MiB", "2.7 TiB"]


def test_json_line_is_one_line_for_every_reader() -> None:
    value = {"id": "a\u2028b\u2029c\x85d\x0b\n", "text": "Grüße", "loss": float("nan")}
    line = json_line(value)
    assert line.splitlines() == [line] and "Grüße" in line
    assert json.loads(line) == {**value, "loss": None}
