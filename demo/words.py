"""What the page says about an answer, in plain words."""

from collections.abc import Sequence

from convmixer import Prediction
from convmixer.explain import HeatMap

NUMBERS = "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"
# A best score below these is called unsure. Of the shipped model's answers on CIFAR-10's test pictures, half of the
# wrong ones and one in twenty of the right ones lie below 0.8. Among many classes right answers have lower scores.
FEW_CLASSES, SURE_OF_FEW, SURE_OF_MANY = 20, 0.8, 0.5


def percent(score: float) -> str:
    """A score from 0 to 1 for people, who need no decimals; it is never quite 0 or 1."""
    if score < 0.01:
        return "<1 %"
    return ">99 %" if score > 0.99 else f"{100 * score:.0f} %"


def is_sure(score: float, classes: int) -> bool:
    """Whether a best score says much, from a model with so many classes."""
    return score >= (SURE_OF_FEW if classes <= FEW_CLASSES else SURE_OF_MANY)


def verdict(predictions: Sequence[Prediction], classes: int) -> str:
    """What else an unsure answer may be; empty for a sure one."""
    if is_sure(predictions[0].score, classes):
        return ""
    other = f"{predictions[1].label}, or " if len(predictions) > 1 else ""
    return f"Not sure: this may also be {other}none of the {count(classes)} that it knows."


def count(classes: int) -> str:
    name = NUMBERS[classes] if classes < len(NUMBERS) else f"{classes:,}"
    return f"{name} thing{'' if classes == 1 else 's'}"


def knows(labels: Sequence[str]) -> str:
    """What a model can answer at all."""
    if len(labels) >= len(NUMBERS):
        return f"This model knows {count(len(labels))}, from {labels[0]} to {labels[-1]}."
    return (
        f"This model knows {count(len(labels))} only: {', '.join(labels)}. It takes whatever it sees for one of them."
    )


def lesson(example: str, labels: Sequence[str]) -> str:
    """What an example teaches whose class a small model does not have; empty for any other."""
    if example in labels or len(labels) > FEW_CLASSES:
        return ""
    return (
        f"A lesson: {example} is none of the {count(len(labels))} that this model knows, and a network has no word for "
        "“something else”. However sure it sounds, it can only name what it learned."
    )


def evidence(score: float, heatmap: HeatMap) -> str:
    """What a heat map shows. The network's own weighing of the evidence is the class's score."""
    if heatmap.values.max() <= 0:
        return f"No evidence for {heatmap.label}."
    strength = "Strong" if score >= SURE_OF_FEW else "Some" if score >= 0.2 else "Weak"
    against = ", and more against it" if heatmap.values.mean() < 0 else ""
    return f"{strength} evidence for {heatmap.label}, most of it {place(heatmap)}{against}."


def place(heatmap: HeatMap) -> str:
    """Where the strongest evidence is: "in the upper left", "in the middle"."""
    rows, columns = heatmap.values.shape
    row, column = divmod(int(heatmap.values.argmax()), columns)
    vertical = ("upper", "middle", "lower")[3 * row // rows]
    horizontal = ("left", "middle", "right")[3 * column // columns]
    return f"in the {vertical if vertical == horizontal else f'{vertical} {horizontal}'}"


def agreement(a: Sequence[Prediction], b: Sequence[Prediction]) -> str:
    """Whether two models' answers about one picture agree, and on what."""
    if a[0].label == b[0].label:
        return f"Both say {a[0].label}: {percent(a[0].score)} and {percent(b[0].score)}."
    shared = [each.label for each in a if each.label in {other.label for other in b}]
    also = f" Both think of {' and '.join(shared[:2])}." if shared else ""
    return f"They differ: {a[0].label}, {percent(a[0].score)}, and {b[0].label}, {percent(b[0].score)}.{also}"
