"""Exit codes: 2 and a sentence for bad input, 1 where some images failed, a traceback for bugs."""

from __future__ import annotations

import errno
import logging
import sys
import warnings
from collections.abc import Callable

from featinv_diffusion.errors import InputError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PLACE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def run(program: Callable[[], object]) -> None:
    """Runs a command or script; what a user can cause becomes a sentence on stderr and exit 2."""
    notes = _NoteHandler()
    logging.getLogger("featinv_diffusion").addHandler(notes)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # for users of the libraries, not of this command
    try:
        program()
    except InputError as error:
        _stop(str(error))
    except OSError as error:
        if (sentence := _describe(error)) is None:
            raise
        _stop(sentence)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _stop("The device ran out of memory. Use a smaller --batch-size, or --dtype float16.")
    finally:
        logging.getLogger("featinv_diffusion").removeHandler(notes)


def _stop(sentence: str) -> None:
    print(f"Error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _describe(error: OSError) -> str | None:
    """Returns a sentence for a full disk or a place that cannot be written, else None."""
    where = f" while writing {error.filename}" if error.filename else ""
    if error.errno in DISK_ERRORS:
        return (
            f"The disk is full or a quota is reached{where} ({error.strerror}). Nothing is left "
            "half-written; free some space, or use another output folder."
        )
    if error.errno in PLACE_ERRORS:
        return f"{error.strerror}{where}. Use a folder that you may write to."
    return None


class _NoteHandler(logging.Handler):
    """Prints the package's warnings; looks stderr up each time, for a progress bar replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"Note: {record.getMessage()}", file=sys.stderr)
