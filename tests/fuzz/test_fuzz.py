"""A few damaged files for each parser of files from outside; `make fuzz` tries many more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import Case, fuzz, limited_memory, process_group
from parsers import PARSERS

EXAMPLES = 12  # of each parser; ten seconds in all


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with process_group():
        yield


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_are_read_or_rejected_by_name(name: str, tmp_path: Path) -> None:
    case = Case(name, tmp_path)
    with limited_memory():
        fuzz(case, 0, EXAMPLES)
