"""Command lines of the benchmarks: one line for what is wrong."""

import argparse
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def at_least_one(text: str) -> int:
    """An argument's type: a whole number above 0."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not a whole number above 0")
    return int(text)


def in_a_folder(text: str) -> Path:
    """An argument's type: a file to be written, in a folder that is there."""
    if not Path(text).absolute().parent.is_dir():  # said now, and not after half an hour
        raise argparse.ArgumentTypeError(f"there is no folder for {text}")
    return Path(text)
