"""Text from prompts, messages and logs made safe to print on a terminal."""


def printable(text: str) -> str:
    """A text on one line, without control characters: terminal commands and marks that reverse the writing direction.

    White space becomes spaces, and what else can't be printed U+FFFD.
    """
    return "".join(
        char if char.isprintable() else " " if char.isspace() else "\N{REPLACEMENT CHARACTER}" for char in text
    )
