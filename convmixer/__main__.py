"""The command line: python -m convmixer classify | models | download | export."""

import argparse
import json
import os
import sys

from convmixer import __version__

DONE, WRONG = 0, 2  # exit codes; classify also has 1, for some that failed


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str):
        self.exit(WRONG, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="convmixer", description="Classify pictures with ConvMixer.")
    parser.add_argument("--version", action="version", version=f"convmixer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    classify = commands.add_parser("classify", help="say what is in pictures", description="Say what is in pictures.")
    classify.add_argument(
        "images", nargs="*", metavar="IMAGE", help="picture, folder of pictures, http(s) address, or - (standard input)"
    )
    classify.add_argument("--output", metavar="FILE", help="write the answers to a .csv, .jsonl or .parquet file")
    classify.add_argument("--resume", action="store_true", help="go on with that file: only what is missing")
    classify.add_argument("--sample", action="store_true", help="a picture that the program draws")
    classify.add_argument(
        "--model",
        default="auto",
        help="name (see the models command), hf:USER/NAME, checkpoint file or timm's folder; default: auto",
    )
    classify.add_argument("--labels", metavar="FILE", help="names of the classes: a text, one a line, or a JSON list")
    classify.add_argument("--top-k", type=positive, default=5, metavar="K", help="answers a picture; default: 5")
    classify.add_argument("--json", action="store_true", help="one JSON object a line")
    classify.add_argument("--heatmap", metavar="FILE", help="write where the best class was seen, as a picture")
    classify.add_argument(
        "--allow-truncated", action="store_true", help="take pictures whose file ends too early, as far as they go"
    )
    classify.add_argument(
        "--workers", type=positive, metavar="N", help="pictures decoded at a time; default: one for each core"
    )
    add_engine_options(classify)

    models = commands.add_parser("models", help="list the models", description="List the models that have a name.")
    models.add_argument("--json", action="store_true", help="one JSON object a line")
    add_engine_options(models)

    download = commands.add_parser(
        "download", help="fetch weights", description="Fetch a model's weights into the cache."
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="name, as in the models command, or hf:USER/NAME")

    export = commands.add_parser(
        "export", help="write a model as ONNX", description="Write a model as one self-contained ONNX file."
    )
    export.add_argument("model", metavar="NAME|FILE", help="as --model of the classify command")
    export.add_argument("--to", required=True, metavar="FILE", help="the file to write, such as model.onnx")

    arguments = parser.parse_args(argv)
    if arguments.command == "classify":
        from .classify import check

        check(arguments, classify.error)
    return arguments


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda, 1 (the second GPU), gpu, mps, ...; default: auto, the GPU where there is one"
    )
    parser.add_argument(
        "--engine", default="auto", help="kernel (this project's), numpy, torch; default: the fastest on this machine"
    )
    parser.add_argument(
        "--precision",
        metavar="FORMAT",
        help="float32, bfloat16, float16 or int8, where the device has them; default: what CONVMIXER_PRECISION says,"
        " else float32 on a CPU and 16 bits on a GPU",
    )


def positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def run_classify(arguments: argparse.Namespace) -> int:
    from .classify import run

    return run(arguments)


def run_models(arguments: argparse.Namespace) -> int:
    from .engine import choose, find_device, look
    from .zoo import MODELS, list_models

    rows = list_models()
    device = find_device(arguments.device, arguments.engine)
    precision = arguments.precision or os.environ.get("CONVMIXER_PRECISION") or "auto"
    for row in rows:
        size = MODELS[row["name"]].config.kernel_size
        choice = choose(look(device, size, precision), size, arguments.engine, precision)
        row |= {"engine": choice.engine, "precision": choice.precision}
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
        return DONE
    table = [("NAME", "PARAMETERS", "INPUT", "TOP-1", "MEASURED ON", "WEIGHTS", "ENGINE")]
    for row in rows:
        table.append(
            (
                row["name"],
                f"{row['parameters']:,}",
                f"{row['input_size']} px",
                "" if row["top1"] is None else f"{row['top1']:.2f} %",
                row["data"] or "",
                "here" if row["path"] else "not here",
                f"{row['engine']}, {row['precision']}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return DONE


def run_download(arguments: argparse.Namespace) -> int:
    from .download import terminal_progress
    from .zoo import download

    for name in arguments.names:
        print(download(name, terminal_progress(name)))
    return DONE


def run_export(arguments: argparse.Namespace) -> int:
    from .download import terminal_progress
    from .export import export_onnx

    export = export_onnx(arguments.model, arguments.to, terminal_progress(arguments.model))
    if export.difference is None:
        checked = "not checked, because onnxruntime is not installed"
    else:
        checked = f"equal to PyTorch in ONNX Runtime up to {export.difference:.0e} of the largest logit"
    print(f"{export.path}: {export.size / 1e6:.1f} MB, opset {export.opset}, {checked}")
    return DONE


def fail(message: str) -> int:
    print(f"convmixer: {message}", file=sys.stderr)
    return WRONG


def main(argv: list[str] | None = None) -> int:
    if None in (sys.stdout, sys.stderr):  # closed by whoever started this
        nothing = open(os.devnull, "w")  # noqa: SIM115
        sys.stdout, sys.stderr = sys.stdout or nothing, sys.stderr or nothing
    for stream in (sys.stdout, sys.stderr):  # a file name or a label that the terminal cannot show is no reason to stop
        stream.reconfigure(errors="backslashreplace")
    arguments = parse(argv)
    commands = {"classify": run_classify, "models": run_models, "download": run_download, "export": run_export}
    try:
        return commands[arguments.command](arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ModuleNotFoundError as error:  # of what only some commands need
        return fail(f"{error.name} is not installed, and this needs it: pip install {error.name}")
    except (ValueError, RuntimeError, OSError) as error:
        return fail(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
