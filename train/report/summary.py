"""What a run has understood, said before its first epoch."""

from train.data.batches import Data

CLASSES = 10  # named; of more, the first ones


def summary(data: Data, start: str, plan: list[str]) -> str:
    """The classes, their pictures, what they are measured on, what was left out, where the weights start, the plan."""
    missing = [label for label, count in zip(data.labels, data.held_out_counts or (), strict=False) if not count]
    rows = {
        "training": [f"{data.training_name}: {_pictures(data.training.plan.images, data.training_counts)}"],
        "classes": [_classes(data.labels, data.training_counts)],
        "held out": [f"{data.held_out_name}: {_pictures(data.held_out_images, data.held_out_counts)}"],
        "missing": [f"{_first(missing)}: no picture to measure on"] if missing else [],
        "left out": data.notes,
        "start": [start],
        "plan": plan,
    }
    return "\n".join(f"{name:<10}{line}" for name, lines in rows.items() for line in lines)


def _pictures(images: int, counts: list[int] | None) -> str:
    known = [count for count in counts or () if count]
    if not known:
        return f"{images:,} pictures"
    few, many = min(known), max(known)
    return f"{images:,} pictures, {few:,}{f' to {many:,}' * (few < many)} a class"


def _classes(labels: tuple[str, ...], counts: list[int] | None) -> str:
    names = [f"{label} ({count:,})" for label, count in zip(labels, counts, strict=True)] if counts else list(labels)
    return f"{len(labels):,}: {_first(names)}"


def _first(names: list[str]) -> str:
    more = f" and {len(names) - CLASSES:,} more" if len(names) > CLASSES else ""
    return ", ".join(names[:CLASSES]) + more
