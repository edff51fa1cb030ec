"""The `llamesh` command of an installed wheel: `llamesh train key=value …` runs `train.py`.

The wheel holds the checkout's files in one package, `llamesh`. Each program is started as a script
in its own process, which puts the package's folder first on `sys.path` as in a checkout; nothing
else is importable at the top level. Imports only the standard library.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = ("train", "prepare", "evaluate", "generate", "convert", "plan")


def main() -> None:
    """Replace this process by the program that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in PROGRAMS:
        print(f"usage: llamesh {{{','.join(PROGRAMS)}}} [key=value ...]")
        print("`llamesh PROGRAM --help` lists the keys of a program.")
        sys.exit(0 if name in ("-h", "--help") else 2)
    program = [sys.executable, str(ROOT / f"{name}.py"), *arguments]
    os.execv(sys.executable, program)
