"""What commands and recipes end with when something is wrong: one line that names it and the way out."""

USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes: bad input, failure while running, Ctrl-C


class CommandError(Exception):
    """What went wrong, for one line on standard error, and the exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


def one_line(error: BaseException | str, most: int = 400) -> str:
    """Put a message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
