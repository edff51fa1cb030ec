"""A FUSE mount that passes through to a folder and can stop answering, as an NFS server may.

The server speaks the kernel's protocol (linux/fuse.h, 7.31) itself, so no library is needed. A
request that it has read and does not answer cannot be interrupted: after SIGKILL the thread that
made it stays in uninterruptible sleep (D state), until the connection is aborted. Run as a program:
`python frozen_mount.py FOLDER MOUNT_POINT FROZEN`.
"""

import ctypes
import os
import re
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENODEV, ENOENT, ENOSYS
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKDIR, UNLINK, RMDIR, RENAME, OPEN, READ, WRITE, STATFS = 9, 10, 11, 12, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 18, 20, 25, 26, 27, 28, 29
FSYNCDIR, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, RENAME2 = 30, 35, 36, 38, 42, 45
NO_REPLY = (FORGET, INTERRUPT, BATCH_FORGET)
# The offset of the name within the body of requests that name a file.
NAMES = {LOOKUP: 0, MKDIR: 8, UNLINK: 0, RMDIR: 0, CREATE: 16, RENAME: 8, RENAME2: 16, SYMLINK: 0}
MAX_WRITE, BIG_WRITES = 1 << 17, 1 << 5
MODE, UID_GID, SIZE, ATIME, MTIME, ATIME_NOW, MTIME_NOW = 1, 6, 8, 16, 32, 128, 256
DETACH = 2  # of umount2


class Server:
    """Answers requests from a folder.

    Args:
        frozen: A file whose content is a regular expression: while it exists, requests for paths
            that match are never answered.
    """

    def __init__(self, folder: str, frozen: Path) -> None:
        self.frozen = frozen
        self.paths = {1: folder}
        self.numbers = {folder: 1}

    def serve(self, device: int) -> None:
        """Answer requests until the mount is gone."""
        while True:
            try:
                request = os.read(device, MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == ENODEV:
                    return
                if error.errno == ENOENT:  # interrupted before it was read
                    continue
                raise
            _, code, unique, node = struct.unpack_from("<IIQQ", request)
            body = request[40:]
            if code in NO_REPLY or self.is_frozen(code, node, body):
                continue
            try:
                answer, error_number = self.answer(code, node, body), 0
            except OSError as error:
                answer, error_number = b"", error.errno or ENOSYS
            header = struct.pack("<IiQ", 16 + len(answer), -error_number, unique)
            with suppress(FileNotFoundError):  # the process was killed
                os.write(device, header + answer)

    def is_frozen(self, code: int, node: int, body: bytes) -> bool:
        try:
            pattern = self.frozen.read_text()
        except FileNotFoundError:
            return False
        path = self.paths.get(node, "")
        if code in NAMES:
            path = self.child(node, body[NAMES[code] :])
        return re.search(pattern, path) is not None

    def child(self, node: int, name: bytes) -> str:
        return os.path.join(self.paths[node], name.split(b"\0")[0].decode())

    def answer(self, code: int, node: int, body: bytes) -> bytes:
        """Return the reply to one request.

        Raises:
            OSError: The reply is its error number.
        """
        if code == INIT:
            sizes = 16, 12, MAX_WRITE, 1, 0, 0, 0  # requests in the background, …
            return struct.pack("<IIIIHHIIHHI28x", 7, 31, MAX_WRITE, BIG_WRITES, *sizes)
        if code in NAMES:
            return self.answer_by_name(code, node, body)
        if code in (READ, WRITE, RELEASE):
            return self.answer_by_file(code, body)
        path = self.paths[node]
        if code == SETATTR:
            self.set_attributes(path, body)
        if code in (GETATTR, SETATTR):
            return self.attributes(path)
        if code == READLINK:
            return os.fsencode(os.readlink(path))
        if code == OPEN:
            return self.opened(os.open(path, struct.unpack_from("<I", body)[0] & ~os.O_CREAT))
        if code == READDIR:
            return self.list(path, *struct.unpack_from("<QI", body, 8))
        if code == STATFS:
            s = os.statvfs(path)
            blocks = s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree
            return struct.pack("<5Q4I24x", *blocks, s.f_bsize, s.f_namemax, s.f_frsize, 0)
        if code in (OPENDIR, FSYNC, FLUSH, RELEASEDIR, FSYNCDIR, DESTROY):
            return self.opened(0) if code == OPENDIR else b""
        raise OSError(ENOSYS, "not implemented")

    def answer_by_name(self, code: int, node: int, body: bytes) -> bytes:
        path, opened = self.child(node, body[NAMES[code] :]), b""
        if code in (RENAME, RENAME2):
            names = body[NAMES[code] :]
            target = self.child(struct.unpack_from("<Q", body)[0], names.split(b"\0", 1)[1])
            os.rename(path, target)
            self.moved(path, target)
            return b""
        if code in (UNLINK, RMDIR):
            (os.unlink if code == UNLINK else os.rmdir)(path)
            self.numbers.pop(path, None)
            return b""
        if code == MKDIR:
            os.mkdir(path, struct.unpack_from("<I", body)[0])
        elif code == SYMLINK:
            os.symlink(body.split(b"\0")[1], path)
        elif code == CREATE:
            flags, mode = struct.unpack_from("<II", body)
            opened = self.opened(os.open(path, flags | os.O_CREAT, mode))
        return self.entry(path) + opened

    def answer_by_file(self, code: int, body: bytes) -> bytes:
        file, offset, size = struct.unpack_from("<QQI", body)
        if code == READ:
            return os.pread(file, size, offset)
        if code == WRITE:
            return struct.pack("<II", os.pwrite(file, body[40 : 40 + size], offset), 0)
        os.close(file)
        return b""

    def entry(self, path: str) -> bytes:
        attributes = self.attribute(path)  # first: the file may be missing
        number = self.numbers.setdefault(path, len(self.paths) + 1)
        self.paths[number] = path
        return struct.pack("<QQQQII", number, 0, 0, 0, 0, 0) + attributes

    def attributes(self, path: str) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self.attribute(path)

    def attribute(self, path: str) -> bytes:
        s = os.lstat(path)
        times = [s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns]
        seconds, nanoseconds = zip(*(divmod(time, 10**9) for time in times), strict=True)
        owner = s.st_mode, s.st_nlink, s.st_uid, s.st_gid, 0, s.st_blksize, 0
        sizes = s.st_ino, s.st_size, s.st_blocks
        return struct.pack("<6Q10I", *sizes, *seconds, *nanoseconds, *owner)

    def set_attributes(self, path: str, body: bytes) -> None:
        valid, _, _, size, _, *times = struct.unpack_from("<IIQQQQQQIII", body)
        if valid & SIZE:
            os.truncate(path, size)
        if valid & MODE:
            os.chmod(path, struct.unpack_from("<I", body, 68)[0] & 0o7777)
        if valid & (ATIME_NOW | MTIME_NOW):
            os.utime(path)
        elif valid & (ATIME | MTIME):
            atime, mtime, _, atime_ns, mtime_ns, _ = times
            os.utime(path, ns=(atime * 10**9 + atime_ns, mtime * 10**9 + mtime_ns))

    def opened(self, file: int) -> bytes:
        return struct.pack("<QII", file, 0, 0)

    def moved(self, source: str, target: str) -> None:
        for number, path in self.paths.items():
            if path == source or path.startswith(source + "/"):
                self.numbers.pop(path, None)
                self.paths[number] = target + path[len(source) :]
                self.numbers[self.paths[number]] = number

    def list(self, path: str, offset: int, size: int) -> bytes:
        listing = b""
        for index, name in enumerate(sorted(os.listdir(path))[offset:], offset + 1):
            mode, encoded = os.lstat(os.path.join(path, name)).st_mode, os.fsencode(name)
            one = struct.pack("<QQII", index, index, len(encoded), stat.S_IFMT(mode) >> 12)
            one += encoded
            one += bytes(-len(one) % 8)
            if len(listing) + len(one) > size:
                break
            listing += one
        return listing


def mount(folder: str, mount_point: str, frozen: Path) -> None:
    """Mount and serve; unmount when the server exits."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    if libc.mount(b"frozen", mount_point.encode(), b"fuse", 6, options.encode()):  # NOSUID, NODEV
        raise OSError(ctypes.get_errno(), f"cannot mount {mount_point}")
    print("mounted", flush=True)
    Server(folder, frozen).serve(device)


class FrozenMount:
    """A mounted folder.

    Attributes:
        path: The mount point.
        folder: The folder behind it, which stays readable.
    """

    def __init__(self, scratch: Path) -> None:
        self.path, self.folder, self._frozen = (scratch / n for n in ("mount", "folder", "frozen"))
        self.path.mkdir()
        self.folder.mkdir()
        arguments = [__file__, self.folder, self.path, self._frozen]
        parent_dies = ctypes.CDLL(None).prctl
        self.server = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: parent_dies(1, signal.SIGKILL),  # which aborts the connection
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "mounted\n"

    def freeze(self, pattern: str = "") -> None:
        """Answer no further request for a path that matches the regular expression."""
        temporary = self._frozen.with_suffix(".tmp")
        temporary.write_text(pattern)
        temporary.rename(self._frozen)

    def close(self) -> None:
        """Abort all requests, so that processes in uninterruptible sleep exit, and unmount."""
        self.server.kill()
        self.server.wait()
        ctypes.CDLL(None).umount2(str(self.path).encode(), DETACH)


@contextmanager
def frozen_mount(scratch: Path) -> Iterator[FrozenMount]:
    """Mount a folder for the duration of the block, as root."""
    if not os.path.exists("/dev/fuse"):
        os.mknod("/dev/fuse", stat.S_IFCHR | 0o666, os.makedev(10, 229))
    mounted = FrozenMount(scratch)
    try:
        yield mounted
    finally:
        mounted.close()


if __name__ == "__main__":
    mount(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
