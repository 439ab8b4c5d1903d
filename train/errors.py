"""What can go wrong in a run. Every message is one line that says what was wrong and what would be right."""

import signal


class DataError(ValueError):
    """The data is not what was asked for."""


class TrainingError(RuntimeError):
    """The run cannot start or go on."""


HELP = {"-h", "--help"}


def end_with_reader() -> None:
    """From now on this process ends in silence when the reader of its output, such as ``head``, has seen enough."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
