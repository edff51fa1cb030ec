"""Fuzz the parsers of files from outside: `make fuzz`.

    python tests/fuzz/run.py [NAME …] [SECONDS=60] [SEED=0]
    python tests/fuzz/run.py NAME INPUT=build/fuzz/NAME/FILE

Each parser runs in a process of its own, which may map 2 GiB more than after start-up and spend
20 s of CPU time on an input. Every input must be read, or be rejected with the parser's own error
that names the file. Another error, an exit of the process or a timeout is a failure: its input is
kept in `build/fuzz`, with the seed that finds it again.
"""

import faulthandler
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzzing import INPUT_SECONDS, ROUND, Case, Damage, fuzz, limited_memory, process_group  # noqa: E402
from parsers import PARSERS  # noqa: E402

FAILURES = ROOT / "build" / "fuzz"


def main() -> int:
    """Fuzz the named parsers, or all, one after the other; return the number of failures."""
    options = dict(each.split("=", 1) for each in sys.argv[1:] if "=" in each)
    names = [each for each in sys.argv[1:] if "=" not in each]
    if unknown := {*names} - PARSERS.keys() or {*options} - {"SECONDS", "SEED", "INPUT", "FOLDER"}:
        raise SystemExit(
            f"{', '.join(unknown)}: unknown; use {', '.join(PARSERS)}, SECONDS=, SEED="
        )
    if "FOLDER" in options:
        return run(names[0], Path(options["FOLDER"]), options)
    if "INPUT" in options:
        return replay(names[0], Path(options["INPUT"]))
    n_failed = 0
    for name in names or PARSERS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, name, f"FOLDER={folder}"]
            command += [f"{key}={value}" for key, value in options.items()]
            code = subprocess.run(command).returncode
            if code not in (0, 1):  # killed by a signal or by the time limit of an input
                keep(name, Path(folder) / name)
                print(f"{name}: the process ended with {code}; its input is in {FAILURES / name}")
            n_failed += code != 0
    print(f"{n_failed} of {len(names or PARSERS)} parsers failed")
    return int(n_failed > 0)


def run(name: str, folder: Path, options: dict[str, str]) -> int:
    """Fuzz one parser until the time is over; return 1 after a failure."""
    end = time.monotonic() + float(options.get("SECONDS", 60))
    number, found = int(options.get("SEED", 0)), set[str]()
    n_rounds = 0
    with process_group():
        case = Case(name, folder, before_input)
        with limited_memory():
            while time.monotonic() < end:
                try:
                    fuzz(case, number, ROUND)
                except Exception as error:
                    where = location(error)
                    if where not in found:
                        found.add(where)
                        print_error(error)
                        path = keep(name, case.folder, len(found), case.last)
                        print(f"{name} SEED={number}: {where}; input: {path}", flush=True)
                number, n_rounds = number + 1, n_rounds + 1
    faulthandler.cancel_dump_traceback_later()
    print(f"{name}: {n_rounds * ROUND} inputs, {len(found)} failures", flush=True)
    return int(bool(found))


def before_input() -> None:
    """Exit, with the traceback of all threads, if the next input takes too long.

    The limit is of elapsed time, and therefore higher than the one of CPU time.
    """
    faulthandler.dump_traceback_later(5 * INPUT_SECONDS, exit=True)


def print_error(error: BaseException) -> None:
    """Print the end of a traceback, without the input, which may be long."""
    error.__notes__ = []
    for line in traceback.format_exception(error, limit=-5, chain=False):
        print(line[:1500].rstrip(), flush=True)


def location(error: BaseException) -> str:
    """Return the error's type and the last lines of our sources that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        each
        for each in frames
        if each.filename.startswith(str(ROOT)) and ".venv" not in each.filename
    ]
    last = next((each for each in reversed(ours) if "tests/fuzz" not in each.filename), ours[-1])
    return f"{type(error).__name__} at {last.filename.removeprefix(f'{ROOT}/')}:{last.lineno}"


def keep(name: str, folder: Path, number: int = 0, last: Damage | None = None) -> Path:
    """Copy the input that failed: the file, or all files of a process that ended."""
    target = FAILURES / name
    target.mkdir(parents=True, exist_ok=True)
    if last is not None:
        target /= f"{number}-{Path(last.file).name}"
        target.write_bytes(last.content)
        return target
    for file in PARSERS[name].files:
        if (folder / file).exists():
            (target / f"crash-{Path(file).name}").write_bytes((folder / file).read_bytes())
    return target


def replay(name: str, path: Path) -> int:
    """Read one kept input, sealed and not; raises the parser's error."""
    file = next(each for each in PARSERS[name].files if path.name.endswith(Path(each).name))
    with tempfile.TemporaryDirectory() as folder, process_group():
        case = Case(name, Path(folder))
        with limited_memory():
            for sealed in (False, True):
                case.check(Damage(file, path.read_bytes(), sealed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
