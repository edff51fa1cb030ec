"""The wheel: one package `llamesh` with the programs, their packages and their configuration."""

import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_package_of_the_checkout_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in ROOT.glob("*/**/__init__.py")}
    here = {".".join(path.relative_to(ROOT).parts) for path in folders}
    here = {name for name in here if not name.startswith((".", "tests", "bench", "build"))}
    assert {name.removeprefix("llamesh.") for name in settings["packages"]} == here | {"llamesh"}


@pytest.mark.slow
def test_installed_wheel_trains_from_an_empty_folder(tmp_path: Path) -> None:
    source, wheels, folder = tmp_path / "source", tmp_path / "wheels", tmp_path / "empty"
    folder.mkdir()
    for name in run("git", "ls-files", cwd=ROOT).splitlines():  # without stale build outputs
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, source, cwd=folder)
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    [wheel] = wheels.iterdir()
    constraints = ROOT / "constraints.txt"
    run(binaries / "pip", "install", "-q", "-c", constraints, wheel, cwd=folder)

    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    ours = {path.name.split(".")[0] for path in ROOT.glob("*/__init__.py")} | {"train", "evaluate"}
    assert (packages / "llamesh" / "train.py").is_file()
    assert [name for name in ours if (packages / name).exists()] == []
    assert [name for name in ours if (packages / f"{name}.py").exists()] == []

    overrides = ("experiment=smoke", "train.max_steps=3", "parallel.accelerator=cpu")
    output = run(binaries / "llamesh", "train", *overrides, cwd=folder)
    assert "Finished: smoke" in output
    assert (folder / "runs/smoke/checkpoints/step-00000003/COMMITTED").exists()
    assert "plan.py" in run(binaries / "llamesh", "plan", "--help", cwd=folder)
