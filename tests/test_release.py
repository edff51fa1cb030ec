"""The audit of a release never passes silently, and the list of parts is of the locked versions."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / ".ci" / "audit.py"
spec = importlib.util.spec_from_file_location("audit", PATH)
assert spec is not None and spec.loader is not None
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

CLEAN: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
SKIPPED: dict[str, Any] = {"name": "b", "skip_reason": "not found on PyPI"}
VULNERABLE: dict[str, Any] = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1"}]}


@pytest.mark.parametrize(
    ("dependencies", "code", "texts"),
    [
        ([CLEAN], 0, ["Audited 1 of 1", "No known vulnerabilities."]),
        ([CLEAN, SKIPPED], 0, ["Audited 1 of 2", "SKIPPED 1 packages", "not found on PyPI"]),
        ([SKIPPED], 0, ["Audited 0 of 1", "SKIPPED"]),
        ([CLEAN, VULNERABLE, SKIPPED], 1, ["c 2: CVE-1", "SKIPPED"]),
        ([], 0, ["SKIPPED", "connection refused"]),
    ],
)
def test_packages_without_data_are_reported_as_skipped(
    dependencies: list[dict[str, Any]], code: int, texts: list[str]
) -> None:
    found, message = audit.summary(dependencies, "warning\nconnection refused\n")
    assert found == code
    assert all(text in message for text in texts)
    if SKIPPED in dependencies or not dependencies:
        assert "No known vulnerabilities" not in message


def test_list_of_parts_has_the_locked_versions() -> None:
    locked = "# a comment\ntorch==2.13.0\nPyYAML==6.0\nast_serialize==0.13.1\n"
    parts = [("torch", "2.13.0+cpu"), ("pyyaml", "6.0"), ("ast-serialize", "0.13.2"), ("x", "1")]
    components = [{"name": name, "version": version} for name, version in parts]
    assert audit.unlocked(components, locked) == ["ast-serialize==0.13.2", "x==1"]
