"""What SECURITY.md states about the sources: no unrestricted unpickling, the umask."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_architecture import source_files

from data.files import write_atomically
from resilience.event_log import EventLog
from resilience.lock import acquire_lock
from resilience.run_folder import RunFolder

FORBIDDEN = (
    *("pickle.load", "pickle.loads", "marshal.loads", "yaml.load", "yaml.unsafe_load"),
    *("eval", "exec"),
)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call in a file with the dotted name of the function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {each.arg: ast.unparse(each.value) for each in call.keywords}


def test_sources_unpickle_nothing_without_restriction() -> None:
    found = []
    # Processes of a benchmark exchange pickles through pipes.
    for path in (each for each in source_files() if each.parent.name != "bench"):
        for name, call in calls(path):
            given = keywords(call)
            if (
                name in FORBIDDEN
                or name.endswith("FileSystemReader")  # DCP's, which unpickles `.metadata`
                or (name.endswith("torch.load") and given.get("weights_only") != "True")
                or "trust_remote_code" in given
            ):
                found.append(f"{path.name}:{call.lineno} {ast.unparse(call)}")
    assert found == []


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_files_and_folders_have_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        folder = RunFolder(tmp_path / "runs/shared")
        lock = acquire_lock(folder, lambda message: None)
        folder.write_config({"run": {}})
        write_atomically(folder.rewinds, b"{}")
        EventLog(folder.event_log).append("start")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
        lock.release()
    finally:
        os.umask(before)
    folders = {"runs", "shared"}
    files = {"lock", "config.yaml", "rewinds.json", "ledger.jsonl"}
    assert modes == dict.fromkeys(folders, 0o777 & ~umask) | dict.fromkeys(files, 0o666 & ~umask)


def test_each_format_of_security_md_is_fuzzed() -> None:
    root = Path(__file__).parents[1]
    stated = (root / "SECURITY.md").read_text()
    fuzzed = (root / "tests/fuzz/parsers.py").read_text()
    for name in re.findall(r"`([a-z_]+\.(?:json|yaml|model|metadata|bin))`", stated):
        assert name in fuzzed, name
