"""The one error a user can cause; the command line turns it into a sentence and exit code 2."""

import re
from pathlib import Path


class InputError(ValueError):
    """Says what must hold, what was given, and what to do."""


def choices_hint(name: str, choices: list[str]) -> str:
    """Returns "did you mean X?" where a choice is near `name`, and the list of choices."""
    from difflib import get_close_matches

    near = get_close_matches(name, choices, n=1)
    hint = elsewhere_hint(name) or (f"did you mean {near[0]!r}? " if near else "")
    return f"{hint}Choices: {', '.join(choices)}."


IN_OTHER_PACKAGE = (
    "convnext-pooled",
    "convnext-stages.1",
    "detr",
    "efficientnet-lite0",
    "siglip",
    "siglip2",
)
"""Members of the tiny family that the package featinv-diffusion-tiny brings; see docs/adr/0019."""


def elsewhere_hint(name: str) -> str:
    """Returns how to get a member of the tiny family that is not installed, else nothing."""
    member = name.removeprefix("tiny/").partition("/")[0]
    folder = Path(__file__).with_name("assets") / "tiny" / member
    if member not in IN_OTHER_PACKAGE or folder.is_dir():
        return ""
    return f"tiny/{member} is installed by pip install featinv-diffusion-tiny. "


UNREACHABLE = "The Hugging Face Hub cannot be reached. Check the network and HF_HUB_OFFLINE"
OFFLINE = f"{UNREACHABLE}, or name a folder or file of this machine"


def reason_of(error: BaseException) -> str:
    """Returns why something could not be loaded, in one line without a full stop."""
    if is_unreachable(error):
        return OFFLINE
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def is_unreachable(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a server cannot be reached."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__ or error
    kinds = {kind.__name__ for one in seen for kind in type(one).__mro__}
    signs = ("couldn't connect to", "not fully cached locally", "outgoing traffic has been")
    named = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "TimeoutException"}
    return bool(kinds & named) or any(
        (isinstance(one, ConnectionError) and not isinstance(one, BrokenPipeError))
        or any(sign in str(one).lower() for sign in signs)
        for one in seen
    )


def what_is_at(place: str | Path) -> str:
    """Returns, in words for a message, what lies where something else was wanted."""
    if is_url(place):
        return "only a URL"
    path = Path(place)
    return "a folder" if path.is_dir() else "a file" if path.exists() else "nothing"


def is_url(place: str | Path) -> bool:
    """Whether this is a URL, also where a `Path` has taken a slash from it."""
    return re.match(r"[a-z][a-z0-9+.-]+:/", str(place)) is not None
