"""Answers written to a file as they come: CSV, JSON lines or Parquet; what was killed goes on where it stopped."""

import csv
import io
import json
import os
from pathlib import Path

from .weights import write_atomically

SUFFIXES = (".csv", ".jsonl", ".parquet")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet runs what begins so


class Results:
    """A file of answers, one for each picture. A context manager: at its end the file is whole.

    path: ends in one of SUFFIXES. top_k: classes an answer, which are CSV's and Parquet's columns. resume: go on with
    what is there; ``done`` names its pictures.

    Each answer is in the file when `add` returns. Parquet can only be written whole: until the end the answers are in a
    file of JSON lines beside it. Raises ValueError for a file that is there and shall not be gone on with, or holds
    something else, and OSError.
    """

    def __init__(self, path: str | os.PathLike, top_k: int, resume: bool = False):
        self.path, self.top_k, self.done = Path(path), top_k, set()
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
        is_parquet = self.path.suffix == ".parquet"
        if is_parquet:
            import pyarrow.parquet  # noqa: F401  before the work and not after it
        self._journal = self.path.with_name(f"{self.path.name}.part.jsonl") if is_parquet else self.path
        self._is_csv = self.path.suffix == ".csv"
        there = [file for file in {self.path, self._journal} if file.exists()]
        if there and not resume:
            raise ValueError(f"{there[0]} is there already; add --resume to go on with it, or name another file")
        if is_parquet and self.path.exists():
            raise ValueError(f"{self.path} is finished; name another file")
        rows = self._read() if self._journal.exists() else []
        self.done = {row["image"] for row in rows}
        content = "".join(map(self._line, rows))
        header = csv_line(self._columns()) if self._is_csv else ""
        write_atomically(self._journal, lambda file: file.write((header + content).encode()))
        self._file = open(self._journal, "a", encoding="utf-8", newline="")  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind, *_) -> None:
        self._file.close()
        if self.path != self._journal and kind is None:
            self._write_parquet()
            self._journal.unlink()

    def add(self, answer: dict) -> None:
        """answer: image, model, engine, precision, and predictions of label, index and score, the best first."""
        self._file.write(self._line(flat(answer, self.top_k) if self._is_csv else answer))
        self._file.flush()

    def _line(self, row: dict) -> str:
        return csv_line(row.values()) if self._is_csv else json.dumps(row) + "\n"

    def _columns(self) -> list[str]:
        return list(flat({"image": "", "model": "", "engine": "", "precision": "", "predictions": []}, self.top_k))

    def _read(self) -> list[dict]:
        """The whole rows of a file that was perhaps cut off in one. Raises ValueError for a file of another kind."""
        text = self._journal.read_text(encoding="utf-8", errors="replace")
        if self._is_csv:
            header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [self._columns()]
            if header != self._columns():
                raise ValueError(f"{self._journal} has other columns; give the same --top-k, or name another file")
            whole = rows if text.endswith("\n") else rows[:-1]
            return [dict(zip(header, map(plain, row), strict=True)) for row in whole if len(row) == len(header)]
        try:
            rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            return [row for row in rows if row["image"] is not None]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._journal} does not hold answers; name another file") from error

    def _write_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([flat(row, self.top_k) for row in self._read()])
        write_atomically(self.path, lambda file: pyarrow.parquet.write_table(table, file))


def flat(answer: dict, top_k: int) -> dict:
    """An answer as one row of a table: label_1, index_1, score_1, label_2, ...; None where there are fewer classes."""
    row = {name: answer[name] for name in ("image", "model", "engine", "precision")}
    best = [*answer["predictions"], *[{}] * top_k][:top_k]
    return row | {f"{key}_{i}": each.get(key) for i, each in enumerate(best, 1) for key in ("label", "index", "score")}


def csv_line(values) -> str:
    """A line of CSV whose texts no spreadsheet takes for formulas."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerow([defused(value) for value in values])
    return stream.getvalue()


def defused(value):
    """A cell; what a spreadsheet would run gets an apostrophe in front, which it shows as text."""
    is_formula = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if is_formula else value


def plain(cell: str) -> str:
    """The inverse of `defused`."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA_STARTS) else cell
