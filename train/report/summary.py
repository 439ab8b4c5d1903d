"""What a run has understood, said before its first epoch."""

from train.data.batches import Data

CLASSES = 10  # named; of more, the first ones


def summary(data: Data, start: str, plan: list[str]) -> str:
    """The classes, their pictures, what they are measured on, what was left out, where the weights start, the plan."""
    rows = [
        ("training", f"{data.training_name}: {_pictures(data.training.plan.images, data.training_counts)}"),
        ("classes", _classes(data.labels, data.training_counts)),
        ("held out", f"{data.held_out_name}: {_pictures(data.held_out_images, data.held_out_counts)}"),
        *(("left out", note) for note in data.notes),
        ("start", start),
        *(("plan", line) for line in plan),
    ]
    if missing := [label for label, count in zip(data.labels, data.held_out_counts or (), strict=False) if not count]:
        rows.insert(3, ("", f"of {_first(missing)} there is none, so that they are not measured"))
    return "\n".join(
        f"{'' if name == before else name:<10}{text}" for (name, text), (before, _) in zip(rows, [("", ""), *rows])
    )


def _pictures(images: int, counts: list[int] | None) -> str:
    known = [count for count in counts or () if count]
    if not known:
        return f"{images:,} pictures"
    few, many = min(known), max(known)
    return f"{images:,} pictures, {few:,}{f' to {many:,}' * (few < many)} a class"


def _classes(labels: tuple[str, ...], counts: list[int] | None) -> str:
    return f"{len(labels):,}: " + _first(
        [f"{label} ({count:,})" for label, count in zip(labels, counts, strict=True)] if counts else list(labels)
    )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - CLASSES:,} more" if len(names) > CLASSES else ""
    return ", ".join(names[:CLASSES]) + more
