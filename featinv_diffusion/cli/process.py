"""The process of `featinv`: what speeds up its start and its end, and is no matter of a function.

Python users and tests call functions; nothing here runs for them.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable

from featinv_diffusion import SELDOM

FEW_MODULES = 50
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names of what `mallopt` sets."""
KEPT, SHARED = 128 * 2**20, 32 * 2**20
"""Bytes of free memory that a process keeps; bytes of a block up to which it is taken from them."""
TRACKERS = ("tensorboard", "wandb")
"""Modules of training that write what they hold at their own time."""


def run(program: Callable[[], None]) -> None:
    """Runs a program that ends in `SystemExit`, and ends the process."""
    collect_seldom_at_start()
    keep_freed_memory()
    try:
        program()
    except SystemExit as done:
        # After an error Python itself unwinds what is left.
        if done.code in (None, 0) and may_leave_at_once():
            _leave()
        raise


def collect_seldom_at_start() -> None:
    """Lets the garbage collector wait until the libraries are imported.

    Half a million objects of modules stay for good, and it would look at them again and again. It
    goes on as always after the first collection that finds few new modules.
    """
    normal, n_modules = gc.get_threshold(), len(sys.modules)

    def watch(phase: str, _info: object) -> None:
        nonlocal n_modules
        if phase != "stop":
            return
        if len(sys.modules) - n_modules < FEW_MODULES:
            gc.callbacks.remove(watch)
            gc.set_threshold(*normal)
        gc.freeze()
        n_modules = len(sys.modules)

    gc.callbacks.append(watch)
    gc.set_threshold(SELDOM, *normal[1:])


def keep_freed_memory() -> None:
    """Lets glibc use what one tensor frees for the next, rather than ask the system for it anew.

    By itself it returns large blocks at once, and each page of the next tensor is then zeroed
    again. Other C libraries are left as they are.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return  # the user has set it
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, SHARED)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def may_leave_at_once() -> bool:
    """Whether nothing is left to do but to free memory, which the system does faster.

    Python takes seconds to free what the libraries hold.
    """
    others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    is_watched = sys.getprofile() is not None or sys.gettrace() is not None or sys.flags.inspect
    is_tracked = not sys.modules.keys().isdisjoint(TRACKERS)
    can_end = hasattr(atexit, "_run_exitfuncs")  # no promise of Python's
    return can_end and not (others or is_watched or is_tracked or _has_other_processes())


def _has_other_processes() -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return True
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave() -> None:
    """Ends the process with 0, after what was registered for its end.

    Returns where the output cannot be written, which Python itself then tells.
    """
    atexit._run_exitfuncs()  # logging, temporary folders, coverage, trackers
    try:
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return
    os._exit(0)
