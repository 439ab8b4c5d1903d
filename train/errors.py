"""What can go wrong in a run. Every message is one line that says what was wrong and what would be right."""


class DataError(ValueError):
    """The data is not what was asked for."""


class TrainingError(RuntimeError):
    """The run cannot start or go on."""
