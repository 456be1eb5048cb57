"""The one error a user can cause; the command line turns it into a sentence and exit code 2."""


class InputError(ValueError):
    """Says what must hold, what was given, and what to do."""


def choices_hint(name: str, choices: list[str]) -> str:
    """Returns "did you mean X?" where a choice is near `name`, and the list of choices."""
    from difflib import get_close_matches

    near = get_close_matches(name, choices, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Choices: {', '.join(choices)}."
