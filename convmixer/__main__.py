"""The command line: python -m convmixer classify | models | download | export."""

import argparse
import json
import os
import sys
from collections.abc import Iterator

DONE, SOME_FAILED, WRONG = 0, 1, 2  # exit codes; WRONG: nothing was done

BATCH = 16  # pictures read before the network runs; a broken one among them does not stop the others
HEATMAP_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    def error(self, message: str):
        self.exit(WRONG, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="convmixer", description="Classify pictures with ConvMixer.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    classify = commands.add_parser("classify", help="say what is in pictures", description="Say what is in pictures.")
    classify.add_argument("images", nargs="*", metavar="IMAGE", help="picture, or folder of pictures")
    classify.add_argument("--sample", action="store_true", help="a picture that the program draws")
    classify.add_argument(
        "--model", default="auto", help="name (see the models command) or checkpoint file; default: auto"
    )
    classify.add_argument("--top-k", type=positive, default=5, metavar="K", help="answers a picture; default: 5")
    classify.add_argument("--json", action="store_true", help="one JSON object a line")
    classify.add_argument("--heatmap", metavar="FILE", help="write where the best class was seen, as a picture")
    add_engine_options(classify)

    models = commands.add_parser("models", help="list the models", description="List the models that have a name.")
    models.add_argument("--json", action="store_true", help="one JSON object a line")
    add_engine_options(models)

    download = commands.add_parser(
        "download", help="fetch weights", description="Fetch a model's weights into the cache."
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="name, as in the models command")

    export = commands.add_parser(
        "export", help="write a model as ONNX", description="Write a model as one self-contained ONNX file."
    )
    export.add_argument("model", metavar="NAME|FILE", help="name (see the models command) or checkpoint file")
    export.add_argument("--to", required=True, metavar="FILE", help="the file to write, such as model.onnx")

    arguments = parser.parse_args(argv)
    if arguments.command == "classify":
        check_classify(arguments, classify)
    return arguments


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the GPU where there is one")
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


def check_classify(arguments: argparse.Namespace, parser: Parser) -> None:
    """What argparse cannot check by itself, before anything is loaded."""
    if not arguments.images and not arguments.sample:
        parser.error("no picture was given: name a file or a folder, or use --sample")
    if arguments.images and arguments.sample:
        parser.error("--sample stands in for a picture: leave out the file names")
    if arguments.heatmap is not None:
        if len(arguments.images) > 1 or any(os.path.isdir(name) for name in arguments.images):
            parser.error("--heatmap writes one picture: name one picture to classify")
        if not arguments.heatmap.lower().endswith(HEATMAP_SUFFIXES):
            parser.error(f"--heatmap {arguments.heatmap}: the name must end in one of {', '.join(HEATMAP_SUFFIXES)}")
        if not os.path.isdir(os.path.dirname(arguments.heatmap) or "."):
            parser.error(f"--heatmap {arguments.heatmap}: that folder does not exist")


def files_in(names: list[str]) -> Iterator[str]:
    """The files named, and every file that is not hidden in the folders named and below them, in order."""
    for name in names:
        if not os.path.isdir(name):
            yield name
            continue
        for folder, subfolders, files in os.walk(name):
            subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
            yield from (os.path.join(folder, file) for file in sorted(files) if not file.startswith("."))


def run_classify(arguments: argparse.Namespace) -> int:
    from .classifier import Classifier
    from .download import terminal_progress
    from .images import ImageError
    from .sample import draw_sample

    classifier = Classifier(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        engine=arguments.engine,
        progress=terminal_progress(arguments.model),
    )
    sources = {"sample": draw_sample()} if arguments.sample else dict.fromkeys(files_in(arguments.images))
    if not sources:
        return fail(f"{', '.join(arguments.images)}: no file in this folder; name a picture or a folder of pictures")
    batch, answered, failed = {}, 0, 0
    for name, picture in sources.items():
        try:
            if arguments.heatmap:
                return classify_with_heatmap(classifier, name, picture or name, arguments)
            batch[name] = classifier.prepare(picture or name)
        except ImageError as error:
            failed += 1
            fail(str(error))
        if len(batch) == BATCH:
            answered += answer(classifier, batch, arguments)
            batch = {}
    answered += answer(classifier, batch, arguments)
    return DONE if not failed else SOME_FAILED if answered else WRONG


def answer(classifier, batch: dict, arguments: argparse.Namespace) -> int:
    """Classifies and prints a batch of prepared pictures by name; gives their number."""
    for name, predictions in zip(batch, classifier.classify_many(batch.values(), arguments.top_k), strict=True):
        show(name, classifier, predictions, arguments.json)
    return len(batch)


def classify_with_heatmap(classifier, name: str, picture, arguments: argparse.Namespace) -> int:
    predictions, heatmap = classifier.classify_with_heatmap(picture, arguments.top_k)
    heatmap.overlay().save(arguments.heatmap)
    show(name, classifier, predictions, arguments.json)
    print(f"{arguments.heatmap}: where the network saw {shown(heatmap.label)}", file=sys.stderr)
    return DONE


def show(name: str, classifier, predictions: list, as_json: bool) -> None:
    """Prints the answer for one picture, as a table or as one line of JSON."""
    if as_json:
        rows = [{"label": p.label, "index": p.index, "score": p.score} for p in predictions]
        engine = {"engine": classifier.engine.name, "precision": classifier.engine.precision}
        print(json.dumps({"image": name, "model": classifier.name, **engine, "predictions": rows}), flush=True)
        return
    labels = [shown(p.label) for p in predictions]
    width = max(map(len, labels))
    print(f"{shown(name)}  ({shown(classifier.name)})")
    for label, p in zip(labels, predictions, strict=True):
        print(f"  {label:<{width}}  {percent(p.score):>8}  {'█' * round(30 * p.score)}".rstrip())
    sys.stdout.flush()


def shown(text: str) -> str:
    """A text out of a stranger's file, without what would command the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def percent(score: float) -> str:
    """A softmax score as percent with two decimals. It is never quite 0 or 1, even where float32 rounds it to that."""
    if score < 0.0001:
        return "<0.01 %"
    return ">99.99 %" if score > 0.9999 else f"{100 * score:.2f} %"


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
