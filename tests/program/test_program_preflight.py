"""What refuses a start: told by the first process, whichever of them is the quickest."""

import os
from pathlib import Path

import pytest
from zygote import Zygote

LATE = """
import os, sys, time
from data.errors import DataError
from program.preflight import refusals

if sys.argv[1:] == ["together"]:
    import torch.distributed
    torch.distributed.init_process_group("gloo")
with refusals():
    if os.environ["RANK"] == "0":
        time.sleep(1.0)
    raise DataError("the shard is gone")
"""


@pytest.mark.parametrize("words", [[], ["together"]])
def test_the_first_process_tells_even_when_another_is_sooner(
    zygote: Zygote, tmp_path: Path, words: list[str]
) -> None:
    """Before and after they have met; what starts them ends all at once when one has failed."""
    program = tmp_path / "late.py"
    program.write_text(LATE)
    done = zygote.run_program([str(program), *words], tmp_path, os.environ, ranks=2)
    assert done.returncode == 1
    assert done.stderr == "Not started: the shard is gone\n"
