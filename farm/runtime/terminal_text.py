"""Makes text from prompts, messages and logs safe to print on a terminal."""


def printable(text: str) -> str:
    """A text on one line, without control characters, terminal commands or marks that reverse the writing direction.

    White space becomes spaces; other unprintable characters become U+FFFD.
    """
    return "".join(
        char if char.isprintable() else " " if char.isspace() else "\N{REPLACEMENT CHARACTER}" for char in text
    )
