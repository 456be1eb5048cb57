"""Exit codes: 0 done, 1 some images failed, 2 a sentence for what a user or machine can cause.

130 and 143 after Ctrl-C and SIGTERM; a bug ends in a traceback and 1.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from threading import Timer
from types import FrameType
from typing import NoReturn

from featinv_diffusion.cli.terminal import open_terminal
from featinv_diffusion.errors import OFFLINE, InputError, is_unreachable

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED, TERMINATED = 130, 143
SWALLOWED = 5.0
"""Seconds after which a signal that did not end the run is sent again."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; no `KeyboardInterrupt`, of which typer makes an exit code of its own."""

    def __init__(self, code: int, again: Timer | None = None):
        super().__init__(code)
        self.code, self.again = code, again


def run(program: Callable[[], object]) -> None:
    """Runs a command or script; what a user can cause becomes a sentence on stderr and exit 2."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # for users of the libraries, not of this command
    _catch_signals()
    try:
        with open_terminal():
            program()
    except InputError as error:
        _stop(str(error))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _stop(describe(error))
    except MemoryError:
        _stop(_memory_advice("This machine"))
    except RuntimeError as error:
        if (device := _out_of_memory(error)) is None:
            raise
        _stop(_memory_advice(device))
    except Exception as error:
        if not is_unreachable(error):
            raise
        _stop(f"{OFFLINE}.")
    except Stopped as stopped:
        if stopped.again is not None:
            stopped.again.cancel()
        _stop("The run was stopped; nothing is left half-written.", stopped.code)


def _stop(sentence: str, code: int = 2) -> NoReturn:
    print(f"Error: {sentence}", file=sys.stderr)
    sys.exit(code)


def describe(error: OSError) -> str:
    """Returns what an `OSError` says as a sentence that tells what to do."""
    where = f" at {_shorten(str(error.filename))}" if error.filename else ""
    if error.errno in DISK_ERRORS:
        return (
            f"The disk is full or a quota is reached{where} ({error.strerror}). Nothing is left "
            "half-written; free some space, or use another output folder."
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Too many files are open at once. Raise the limit with `ulimit -n 4096`."
    if error.errno == errno.ENOMEM:
        return _memory_advice("This machine")
    if error.errno == errno.ENOENT and not _has_working_folder():
        return "The working folder was deleted. Change to one that exists."
    if error.errno == errno.ENAMETOOLONG:
        return f"{error.strerror}{where}. Use a shorter name."
    if error.errno is None:
        return " ".join(str(error).split()) or type(error).__name__
    return f"{error.strerror}{where}. Use a path that exists and that you may read and write."


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _shorten(path: str) -> str:
    return path if len(path) <= 120 else f"{path[:60]}…{path[-40:]}"


def _out_of_memory(error: RuntimeError) -> str | None:
    """Returns what ran out of memory, in words; None for another error."""
    if type(error).__name__ == "OutOfMemoryError":
        return "The device"
    text = str(error)
    signs = ("DefaultCPUAllocator", "not enough memory", "bad_alloc", "allocate memory")
    return "This machine" if any(sign in text for sign in signs) else None


def _memory_advice(who: str) -> str:
    return (
        f"{who} ran out of memory. Use smaller batches (--batch-size, or optim.batch_size in "
        "training), smaller pictures, or half precision."
    )


def _catch_signals() -> None:
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        code = TERMINATED if number == signal.SIGTERM else INTERRUPTED
        if os.getpid() != owner:  # a data worker, which its parent ends
            os._exit(code)
        # A callback of a library, such as a destructor, may swallow the exception.
        again = Timer(SWALLOWED, os.kill, (owner, number))
        again.daemon = True
        again.start()
        raise Stopped(code, again)

    with suppress(ValueError):  # outside the main thread nothing can be caught
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
