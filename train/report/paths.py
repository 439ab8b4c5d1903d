"""Commands and names as others may read them, in a model's card: without the folders of the machine that made it."""

import os
import shlex
from itertools import pairwise

OPTIONS = ("--data", "--out", "--weights", "--class-names")  # whose values may be paths


def public_name(name: str) -> str:
    """The last part of a path to data or to a model; names of the Hugging Face Hub, and no name, as they are."""
    prefix = next((prefix for prefix in ("wds/", "hfds/") if name.startswith(prefix)), "")
    path = os.path.expanduser(name.removeprefix(prefix))
    on_the_hub = prefix == "hfds/" and not path.startswith((".", "/")) and not os.path.isdir(path)
    return (
        name if not name or on_the_hub or name.startswith("hf:") else prefix + os.path.basename(os.path.abspath(path))
    )


def public_command(arguments: list[str]) -> str:
    """The command line of train/run.py that starts such a run."""
    words = ["python", "train/run.py"]
    for before, word in pairwise(["", *arguments]):
        option, equals, value = word.partition("=")
        if before.replace("_", "-") in OPTIONS:
            word = public_name(word)
        elif equals and option.replace("_", "-") in OPTIONS:
            word = f"{option}={public_name(value)}"
        words += [word] if word != "--resume" else []
    return shlex.join(words)
