"""The `train.py` commands of the benchmarks start a new run."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

BENCHES = [
    path for path in sorted((ROOT / "bench").glob("*.py")) if '"train.py"' in path.read_text()
]


@pytest.mark.parametrize("path", BENCHES, ids=lambda path: path.stem)
def test_bench_in_a_new_folder_names_a_configuration(path: Path) -> None:
    # `run.dir=` without a group resumes: in a folder without a run it is an error.
    source = path.read_text()
    assert "run.dir=" not in source or re.search(r'"(model|experiment|data|tokenizer)=', source)
