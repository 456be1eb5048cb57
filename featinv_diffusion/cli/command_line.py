"""The command as the user would type it again."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """Returns it quoted for a shell, for files that say how they came about.

    Which worker of many it was is left out, as the files are those of one process.
    """
    words, kept = iter(sys.argv[1:]), ["featinv"]
    for word in words:
        if word == "--worker":
            next(words, None)
        elif not word.startswith("--worker="):
            kept.append(word)
    return shlex.join(kept)
