"""Classifies a data set of pictures on a Ray cluster: actors hold the model, Parquet comes out.

    python -m convmixer.cluster PICTURES [PICTURES ...] --output FOLDER [--model NAME|FILE] [--address auto]

PICTURES are folders or files that every node can read, such as s3://BUCKET/FOLDER. Each picture is one row, with the
columns of `convmixer.results.flat` and ``problem``, a line where the picture could not be read. A node that is lost
costs the work that it had under way, which others do again: no picture is missing and none is there twice. Needs
`pip install 'convmixer[cluster]'` on every node.
"""

import argparse
import sys

from .classifier import Classifier
from .images import ImageError
from .results import flat

BATCH = 64


class Answering:
    """A model in a process of the cluster: batches of encoded pictures to batches of answers."""

    def __init__(self, model: str, top_k: int, device: str | None):
        self.classifier, self.top_k = Classifier(model, device=device), top_k

    def __call__(self, batch: dict) -> dict:
        """batch: arrays ``path`` of names and ``bytes`` of encoded pictures. Gives the columns of the answers."""
        engine = self.classifier.engine
        answers = self.classifier.classify_many(batch["bytes"], self.top_k, errors="return")
        rows = []
        for path, answer in zip(batch["path"], answers, strict=True):
            is_broken = isinstance(answer, ImageError)
            about = {"image": path, "model": self.classifier.name, "engine": engine.name, "precision": engine.precision}
            ranked = [] if is_broken else [vars(prediction) for prediction in answer]
            problem = str(answer).replace("the picture", path, 1) if is_broken else ""
            rows.append(flat(about | {"predictions": ranked}, self.top_k) | {"problem": problem})
        return {column: [row[column] for row in rows] for column in rows[0]}


def classify(pictures: list[str], output: str, model: str = "auto", top_k: int = 5, actors: int = 1, gpus: float = 0):
    """Writes the answers as Parquet files into the folder ``output``. To be called where Ray is connected.

    actors: how many hold the model. gpus: of each actor; 0: it runs on a CPU. Raises what Ray raises.
    """
    import ray

    files = ray.data.read_binary_files(pictures, include_paths=True)
    answers = files.map_batches(
        Answering,
        fn_constructor_args=(model, top_k, "cuda" if gpus else "cpu"),
        batch_size=BATCH,
        # A pool that can shrink: when a node is lost, reading needs CPUs, too.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_gpus=gpus,
    )
    answers.write_parquet(output)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m convmixer.cluster", description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="+", metavar="PICTURES", help="folder or file that every node can read")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the Parquet files")
    parser.add_argument("--model", default="auto", help="name or checkpoint file, on every node; default: auto")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="answers a picture; default: 5")
    parser.add_argument("--address", default="auto", help="of the cluster; default: the one that this machine is in")
    parser.add_argument("--actors", type=int, default=1, help="processes that hold the model; default: 1")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor; default: none")
    options = parser.parse_args()
    try:
        import ray
    except ImportError:
        parser.error("this needs Ray on every node: pip install 'convmixer[cluster]'")
    try:
        ray.init(address=options.address, log_to_driver=False)
        classify(options.pictures, options.output, options.model, options.top_k, options.actors, options.gpus)
    except (ConnectionError, ValueError, OSError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()
        print(f"convmixer.cluster: {reason[-1] if reason else type(error).__name__}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
