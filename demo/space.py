"""Write the demo as a Hugging Face Space: a folder that needs nothing else of this repository.

    python demo/space.py --to FOLDER
    hf upload --repo-type space USER/NAME FOLDER .

`hf`, which comes with Gradio, creates the Space if there is none of that name yet (and asks for `hf auth login` once).
"""

import shutil
import sys
from pathlib import Path

PROGRAM = "demo/space.py"
ROOT = Path(__file__).resolve().parents[1]
WRONG = 2  # exit code


def main(argv: list[str] | None = None) -> int:
    from convmixer.__main__ import Parser

    parser = Parser(prog=PROGRAM, description="Write the demo as a Hugging Face Space.")
    parser.add_argument("--to", required=True, type=Path, metavar="FOLDER", help="a folder that is new, or empty")
    folder = parser.parse_args(argv).to
    try:
        write(folder)
    except OSError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return WRONG
    print(f"{folder} is a complete Space; to publish it: hf upload --repo-type space USER/NAME {folder} .")
    return 0


def write(folder: Path) -> None:
    """Raises FileExistsError if there is something in ``folder`` already, and writes nothing then."""
    contents = files()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give a new folder")
    for name, source in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
    (folder / "requirements.txt").write_text(requirements())


def files() -> dict[str, Path]:
    """The files of a Space by their names in it, but for its requirements.txt."""
    package = [path for path in (ROOT / "convmixer").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    page = [path for path in (ROOT / "demo").glob("*.*") if path.suffix in {".py", ".css", ".js", ".svg", ".jpg"}]
    named = {str(path.relative_to(ROOT)): path for path in [*package, *page, ROOT / "LICENSE"]}
    del named["demo/space.py"]
    return named | {"README.md": ROOT / "demo" / "space" / "README.md"}


def requirements() -> str:
    """The demo's and the core's pins as one file."""
    lines = [line for name in ("core", "demo") for line in (ROOT / f"requirements/{name}.txt").read_text().splitlines()]
    return "\n".join(line for line in lines if line[0] not in "#-") + "\n"


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # so that `convmixer` is found
    sys.exit(main())
