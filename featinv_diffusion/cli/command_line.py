"""The command as the user would type it again."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """Returns it quoted for a shell, for files that say how they came about."""
    return shlex.join(["featinv", *sys.argv[1:]])
