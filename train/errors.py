"""What the user can mend: shown as one line, without a traceback, by `start` of run/cli.py."""


class UserError(Exception):
    """A flag, a file or a folder that cannot work."""


class DataError(ValueError):
    """Something is wrong with the user's data; the message is one line that names the file and the value."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))  # a file name may hold a newline: still one line
