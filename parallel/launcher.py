"""Fabric's launcher of local processes, without its supervision.

Fabric kills the main process without a word when a child has died, up to five seconds later. Here
whoever launches gets the children, and looks after them (`resilience.watchdog`).
"""

import subprocess
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher


class Launcher(_SubprocessScriptLauncher):
    """Starts the processes of this node, and hands them over."""

    on_children: Callable[[list["subprocess.Popen[Any]"]], None]

    def _call_children_scripts(self) -> None:
        super()._call_children_scripts()
        self.on_children(self.procs)
        self.procs = []  # of which Fabric's observer then finds none to watch
