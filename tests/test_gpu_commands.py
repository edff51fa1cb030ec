"""Every GPU command of README and docs fits on the hardware that its comment line names.

A line such as `# 8 × H100` in a block of shell commands applies to the commands after it.
"""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from cli.arguments import CONF, plan_arguments
from cli.config import load_plan_config
from planning.plan import plan_run
from planning.request import configured_choice

PROGRAMS = ("train.py", "plan.py", "slurm/train.sbatch")
SIZES = {
    "nodes": r"--n?nodes=(\d+)",
    "per_node": r"--(?:nproc-per-node|ntasks-per-node)=(\d+)",
}


def commands() -> Iterator[tuple[str, int, str, list[str]]]:
    """Yield (file, devices, hardware, words) of each command with a published model."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            devices, hardware = 0, ""
            for line in block.replace("\\\n", " ").splitlines():
                if named := re.match(r"# (\d+) × ([A-Z]+\d+)", line):
                    devices, hardware = int(named[1]), named[2].lower()
                words = shlex.split(line, comments=True)
                if set(words) & set(PROGRAMS) and re.search(r"(model|experiment)=", line):
                    yield path.name, devices, hardware, words


@pytest.mark.parametrize(("file", "devices", "hardware", "words"), commands())
def test_gpu_command_fits_on_the_hardware_it_names(
    file: str, devices: int, hardware: str, words: list[str]
) -> None:
    assert devices and hardware, "the block does not name its hardware, such as `# 8 × H100`"
    launched = 1
    for pattern in SIZES.values():
        launched *= int(next((m[1] for word in words if (m := re.match(pattern, word))), 1))
    start = next(index for index, word in enumerate(words) if word in PROGRAMS)
    overrides: list[str] = []
    if words[start] != "plan.py":
        # Fabric starts a process for each device of the machine.
        assert launched in (devices, 1), "launched on another number of devices"
        overrides = [f"hardware={hardware}", f"devices={devices}"]
    # `model=` is given, and the weights are not here.
    given = [word for word in words[start + 1 :] if not word.startswith("run.init_from=")]
    arguments = plan_arguments([*overrides, *given])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = load_plan_config(compose("plan", arguments))
    assert (config.n_devices, config.hardware.name) == (devices, hardware)
    if config.search:
        return  # finds what fits
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.hardware)
    assert run.fits, run.bottleneck
