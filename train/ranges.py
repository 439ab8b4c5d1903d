"""What a field of the command line may be, and the one line that says so."""

import math
from dataclasses import dataclass, field
from typing import Any

from train.errors import TrainingError


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; ``above`` and ``below`` leave the end itself out."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high and math.isfinite(value)  # False for NaN, too
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        words = [f"{'above' if self.above else 'at least'} {self.low:g}"]
        if self.high < math.inf:
            words.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        return " and ".join(words)


SHARE = Range(0, 1)  # also a chance
WITHIN = Range(0, 1, above=True, below=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
COUNT = Range(1)


def ranged(allowed: Range, default: Any = ..., **options) -> Any:
    """A dataclass's field with a range; None stays allowed where it is the default."""
    options |= {} if default is ... else {"default": default}
    return field(metadata={"range": allowed}, **options)


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raises TrainingError for a field of the dataclass that is out of its range."""
    for name, its in settings.__dataclass_fields__.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple) else (value,):
            if "range" in its.metadata and number is not None and number not in its.metadata["range"]:
                raise TrainingError(f"{prefix}{name} is {value}; it must be {its.metadata['range']}")
