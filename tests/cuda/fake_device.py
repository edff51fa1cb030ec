"""Run a function in a process where PyTorch's CPU build has a fake CUDA device.

`on_fake_device(function, …)` forks the process from a server that has loaded `guard.cpp` before
torch and imported everything once. There, `cuda_stubs` replaces `torch.cuda`, and every tensor on
CUDA is a FakeTensor: shapes, dtypes, devices, kernels and calls are real, values are not. The
process of the tests is not affected.
"""

import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

SOURCE = Path(__file__).with_name("guard.cpp")
# As pytest's cache would be, but shared by all checkouts: the name holds version and source.
CACHE = Path(tempfile.gettempdir()) / f"llamesh-fake-cuda-{os.getuid()}"
_start_lock = threading.Lock()


@dataclass(frozen=True)
class Gpus:
    """The fake GPUs that a process sees."""

    capability: tuple[int, int] = (9, 0)
    count: int = 8
    name: str = "NVIDIA H200"
    memory_gib: float = 139.8
    cudnn: bool = True


def on_fake_device(
    function: Callable[..., Any],
    *arguments: Any,
    capability: tuple[int, int] = (9, 0),
    gpus: int = 8,
    name: str = "NVIDIA H200",
    memory_gib: float = 139.8,
    cudnn: bool = True,
    generates_code: bool = False,
) -> Any:
    """Return `function(*arguments)` as computed in a process with `gpus` fake GPUs.

    Args:
        function: Defined at the top level of a module.
        cudnn: Whether the build has cuDNN's attention, which PyTorch prefers on sm_90 and sm_100.
        generates_code: Leave Inductor as it is; else `fake_inductor` stops it before the code.

    Raises:
        RuntimeError: with the traceback of the process.
    """
    from distributed import collect  # imports torch, which the server must not do before the guard

    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run,
        args=(
            *(sender, Gpus(capability, gpus, name, memory_gib, cudnn), generates_code),
            *(function, arguments),
        ),
        daemon=True,
    )
    # The other server, of `on_ranks`, is the default one.
    with _start_lock:
        connect = _server().connect_to_new_process
        with mock.patch.object(forkserver, "connect_to_new_process", connect):
            process.start()
    sender.close()  # leaves the process the only writer, so that its death closes the pipe
    try:
        return collect({receiver: 0})[0]
    finally:
        process.kill()
        process.join()


@cache
def _server() -> forkserver.ForkServer:
    """Start the server, once in each process of the tests."""
    guard_library()  # errors are raised here, not in the server
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["fake_device_server"])
    path = os.pathsep.join(filter(None, sys.path))
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        server.ensure_running()
    return server


def _run(
    sender: Connection,
    gpus: Gpus,
    generates_code: bool,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    try:
        import cuda_stubs
        import fake_inductor

        cuda_stubs.configure(gpus)
        if not generates_code:
            fake_inductor.install()
        result = pickle.dumps((True, function(*arguments)))
    except BaseException:  # DCP raises errors that are not Exceptions
        result = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(result)
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads or destructors


def guard_library() -> Path:
    """Return the compiled `guard.cpp`; compile it if neither torch nor the source are known."""
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(f"{version} {sys.implementation.cache_tag}".encode())
    digest.update(SOURCE.read_bytes())
    library = CACHE / f"guard-{version}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        compiler = shutil.which("g++")
        if compiler is None:
            raise RuntimeError("tests/cuda needs a C++ compiler; install g++")
        torch = torch_folder()
        CACHE.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=CACHE, suffix=".so", delete=False) as file:
            flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}"]
            libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
            subprocess.run([compiler, *flags, "-o", file.name, str(SOURCE), *libraries], check=True)
        os.replace(file.name, library)  # atomic: other processes may compile it too
    return library


def torch_folder() -> Path:
    """Return the folder of the package torch without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
