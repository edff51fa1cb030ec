"""Run a parser on damaged files under limits of memory and time, and keep inputs that fail it."""

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mutations import Draw, damaged
from parsers import PARSERS

MEMORY_BYTES = 2 * 2**30  # that a parser may map in addition to what the process has
INPUT_SECONDS = 20.0  # of CPU time
ROUND = 300  # examples of one seed


class Damage(NamedTuple):
    """Damaged content of a file.

    Attributes:
        sealed: Whether hashes are made valid again.
    """

    file: str
    content: bytes
    sealed: bool

    def __repr__(self) -> str:
        return f"{self.file}: {self.content[:80]!r}, {len(self.content)} bytes"


class Case:
    """A parser and its valid files in a folder."""

    def __init__(
        self, name: str, folder: Path, before_input: Callable[[], object] = lambda: None
    ) -> None:
        self.name, self.parser, self.before_input = name, PARSERS[name], before_input
        self.last = Damage("", b"", False)
        self.folder = folder / name
        self.folder.mkdir()
        self.parser.make(self.folder)
        self.valid = {file: (self.folder / file).read_bytes() for file in self.parser.files}
        self.backup = folder / f"{name}.valid"
        shutil.copytree(self.folder, self.backup)
        self.parser.read(self.folder)  # valid files raise nothing
        self.restore()

    def restore(self) -> None:
        """Make all files valid again."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.backup, self.folder)

    def check(self, damage: Damage) -> None:
        """Read the folder with a damaged file.

        Raises:
            AssertionError, Exception: The parser raised another error than its own, one that does
                not name a file, or took too long.
        """
        self.before_input()
        self.restore()
        (self.folder / damage.file).write_bytes(damage.content)
        if damage.sealed and self.parser.seal is not None:
            self.parser.seal(self.folder)
        start = time.process_time()
        try:
            self.parser.read(self.folder)
        except self.parser.errors as error:
            names = {str(self.folder), *(Path(each).name for each in self.valid)}
            assert any(name in str(error) for name in names), f"names no file: {error}"
            assert len(str(error)) < 20_000, "the message is too long"
        assert time.process_time() - start < INPUT_SECONDS, "took too long"


def fuzz(case: Case, first_seed: int, n_examples: int) -> None:
    """Check a number of damaged files; the same seed gives the same ones.

    Raises:
        Exception: Of the first input that fails.
    """

    @seed(first_seed)
    @settings(
        max_examples=n_examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking takes minutes, and the inputs are small
    )
    @given(inputs(case))
    def check(damage: Damage) -> None:
        case.last = damage
        case.check(damage)

    check()


@st.composite
def inputs(draw: Draw, case: Case) -> Damage:
    """Return damage of a file of a case."""
    file = draw(st.sampled_from(sorted(case.valid)))
    content = draw(damaged(case.valid[file], case.parser.files[file]))
    return Damage(file, content, case.parser.seal is not None and draw(st.booleans()))


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit the address space to `MEMORY_BYTES` more than is mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def process_group() -> Iterator[None]:
    """Create a process group of one process, which resuming a run needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
