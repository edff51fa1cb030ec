"""Run a program and write the names of all imported modules: OUTPUT.json PROGRAM.py ARGUMENTS…"""

import json
import os
import runpy
import sys

if __name__ == "__main__":
    output, *sys.argv = sys.argv[1:]
    sys.path[0] = os.getcwd()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        with open(output, "w") as file:
            json.dump(sorted(sys.modules), file)
