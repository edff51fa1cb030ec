"""Command line, help, configuration loading and user-facing errors.

Every program imports this package first. In an environment without the dependencies it stops here
with the remedy, instead of a trace of the import that failed.
"""

import sys
from importlib.util import find_spec

REQUIRED = ("hydra", "omegaconf", "pydantic", "torch", "lightning_fabric", "tiktoken", "isal")

if missing := [name for name in REQUIRED if find_spec(name) is None]:
    sys.exit(
        f"Not installed for {sys.executable}: {', '.join(missing)}. Activate the environment of "
        "Llamesh with `source .venv/bin/activate`; `make train` creates it, or `pip install -c "
        "constraints.txt -e .` in an environment of your own."
    )
