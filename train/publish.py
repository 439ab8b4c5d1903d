"""Writes a run as a repository of the Hugging Face Hub, and uploads it.

    python train/publish.py RUN [--best] [--to hf:USER/NAME] [--private] [--folder DIR]

RUN is a run folder of train/run.py or a model.safetensors file. The repository is a folder, RUN/hub by default, with
model.safetensors as it is, config.json, README.md (the model card) and, out of a run folder, metrics.csv, recipe.json
and the pictures. --best takes the weights after the run's best epoch, its best.safetensors. One of the published
ImageNet shapes gets timm's config.json, so that timm opens the repository by itself. The upload uses the token of
`hf auth login`, or HF_TOKEN.
"""

import glob
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
import yaml

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `train` and `convmixer` are found

from convmixer import hub
from convmixer.config import PUBLISHED, ConvMixerConfig
from convmixer.weights import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    read_description,
    write_atomically,
)
from train.errors import HELP, end_with_reader
from train.report.card import model_card
from train.report.console import read_metrics

MODEL, BEST, CONFIG, CARD = hub.WEIGHTS, "best.safetensors", hub.CONFIG, "README.md"
RECORDS = ("metrics.csv", "recipe.json")
TASK = "image-classification"
LOCAL_USE = re.compile(r"^## How to use it\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)  # of the files in a run folder
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?\n)??---[ \t]*(?:\n|\Z)(.*)", re.DOTALL)


class PublishError(RuntimeError):
    """What cannot be published, in one line that says why."""


@dataclass(frozen=True)
class Publication:
    """Writes a run as a repository of the Hugging Face Hub, and uploads it."""

    run: tyro.conf.Positional[Path]  # run folder of train/run.py, or a model.safetensors file
    to: str | None = None  # hf:USER/NAME; without it only the folder is written
    best: bool = False  # the weights after the best epoch on the held-out pictures, not the last
    folder: Path | None = None  # where the repository is written; RUN/hub by default
    private: bool = False  # create a repository that only you can see


def find_model(run: Path, best: bool = False) -> Path:
    """The model.safetensors, or the best.safetensors, of a run. Raises PublishError."""
    if not run.exists():
        raise PublishError(f"there is no {run}; name a run folder of train/run.py or a {MODEL} file")
    if best and not run.is_dir():
        raise PublishError(f"--best is for a run folder, and {run} is a file; name {run.parent}, or leave out --best")
    name = BEST if best else MODEL
    path = run / name if run.is_dir() else run
    if not path.is_file():
        raise PublishError(f"{run} holds no {name}, which a run of train/run.py writes after its first epoch")
    return path


def hub_name(to: str) -> str:
    """USER/NAME out of hf:USER/NAME. Raises PublishError where the Hub would not take it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = to.removeprefix(hub.PREFIX)
    if not to.startswith(hub.PREFIX) or name.count("/") != 1:
        raise PublishError(f"--to {to}: it must be {hub.PREFIX}USER/NAME, such as {hub.PREFIX}ada/convmixer-flowers")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise PublishError(f"--to {to}: {error}") from error
    return name


def timm_architecture(config: ConvMixerConfig) -> str | None:
    """timm's name for a network of this shape, whatever the number of classes; None where timm has none."""
    for name, published in PUBLISHED.items():
        if replace(published, num_classes=config.num_classes) == config:
            return name
    return None


def hub_config(checkpoint: Checkpoint) -> dict:
    """The content of config.json: timm's where timm knows the shape, else what the checkpoint says of itself."""
    preprocessing, labels = checkpoint.preprocessing, list(checkpoint.labels)
    architecture = timm_architecture(checkpoint.config)
    if architecture is None:
        return {
            "library_name": "convmixer",
            "name": checkpoint.name,
            "architecture": checkpoint.config.to_dict(),
            "labels": labels,
            "preprocessing": preprocessing.to_dict(),
        }
    # The keys are those of timm.models._hub.save_config_for_hf.
    return {
        "architecture": architecture,
        "num_classes": len(labels),
        "num_features": checkpoint.config.dim,
        "global_pool": "avg",
        "label_names": labels,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [checkpoint.config.in_chans, preprocessing.size, preprocessing.size],
            "fixed_input_size": False,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(labels),
            "pool_size": None,
            "first_conv": "stem.0",
            "classifier": "head",
        },
    }


def measured(checkpoint: Checkpoint) -> dict[str, float]:
    """What the checkpoint says that it reached, of top-1 and top-5, in percent; empty if it does not say on what."""
    accuracy = checkpoint.accuracy
    if not accuracy.get("data"):
        return {}
    figures = {f"top-{k}": accuracy.get(f"top{k}") for k in (1, 5)}
    return {name: value for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)}


def front_matter(checkpoint: Checkpoint) -> dict:
    """The card's metadata as the Hub specifies it: https://huggingface.co/docs/hub/model-cards"""
    libraries = ["timm", "convmixer"] if timm_architecture(checkpoint.config) else ["convmixer"]
    fields = {"library_name": libraries[0], "pipeline_tag": TASK, "tags": [TASK, *libraries]}
    if figures := measured(checkpoint):
        data = str(checkpoint.accuracy["data"])
        result = {
            "task": {"type": TASK},
            # The type is not the id of a data set on the Hub: a hold-out is not what others measure on.
            "dataset": {"name": data, "type": re.sub(r"\W+", "-", data.lower()).strip("-") or "pictures"},
            "metrics": [
                {"type": "accuracy", "name": f"{name} (%)", "value": round(value, 4)} for name, value in figures.items()
            ],
        }
        fields["model-index"] = [{"name": checkpoint.name, "results": [result]}]
    return fields


def usage(checkpoint: Checkpoint, repo: str | None) -> str:
    """The card's last section: the commands that use the repository, or the bare folder where ``repo`` is None."""
    code = ""
    if timm_architecture(checkpoint.config):
        source = f"hf-hub:{repo}" if repo else "local-dir:."
        code = f"""```python
import timm

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

"""
    return f"""
## Use of these files

{code}With the package `convmixer`, which this model was trained with:

```sh
python -m convmixer classify IMAGE --model {f"{hub.PREFIX}{repo}" if repo else MODEL}
```
"""


def split_card(text: str) -> tuple[dict, str]:
    """The front matter, {} if there is none, and the text of a model card. Raises PublishError."""
    match = FRONT_MATTER.match(text.replace("\r\n", "\n"))
    if match is None:
        return {}, text
    try:
        fields = yaml.safe_load(match[1] or "") or {}
    except yaml.YAMLError as error:
        raise PublishError(f"the front matter of {CARD} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise PublishError(f"the front matter of {CARD} must be keys with values, such as `license: mit`")
    return fields, match[2]


def hub_card(checkpoint: Checkpoint, own: str | None, repo: str | None) -> str:
    """README.md: the run's ``own`` card, or one made from the checkpoint, with how to use the repository at its end."""
    fields, text = split_card(model_card(checkpoint, [], None) if own is None else own)
    added = front_matter(checkpoint)
    tags = fields.get("tags") or []
    added["tags"] += [tag for tag in (tags if isinstance(tags, list) else [tags]) if tag not in added["tags"]]
    header = yaml.safe_dump(fields | added, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{header}---\n\n{LOCAL_USE.sub('', text).strip()}\n{usage(checkpoint, repo)}"


def write_repository(run: Path, folder: Path, repo: str | None, best: bool = False) -> list[str]:
    """Writes the repository and gives the names of its files. Raises PublishError, CheckpointError and OSError.

    Other files that are in the folder stay there and are none of the names.
    """
    model = find_model(run, best)
    if read_description(model) is None:
        raise CheckpointError(f"{model}: holds tensors alone; a {MODEL} of train/run.py also holds labels")
    load_checkpoint(model)  # whole and finite, before anything is written
    beside = {path.name: path for path in sorted(run.iterdir()) if path.is_file()} if run.is_dir() else {}
    pictures = [name for name in beside if name.endswith(".png") and not (best and name == "confusion.png")]
    own = beside[CARD].read_text(encoding="utf-8") if CARD in beside else None
    if best:  # the run's own card and confusion matrix are about its last epoch
        history = read_metrics(beside["metrics.csv"]) if "metrics.csv" in beside and "curves.png" in beside else []
        own = model_card(read_description(model), history, None)
    if folder.resolve() == model.parent.resolve():
        raise PublishError(f"--folder {folder} is the run itself; name another one")
    split_card(own or "")  # whole, before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    copies = {MODEL: model} | {name: beside[name] for name in (*RECORDS, *pictures) if name in beside}
    for name, path in copies.items():
        with open(path, "rb") as source:
            write_atomically(folder / name, lambda file, source=source: shutil.copyfileobj(source, file))
    checkpoint = read_description(folder / MODEL)  # of the copy: a run that goes on replaces its file
    config = json.dumps(hub_config(checkpoint), indent=2) + "\n"
    card = hub_card(checkpoint, own, repo)
    for name, text in ((CONFIG, config), (CARD, card)):
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    return [MODEL, CONFIG, CARD, *(name for name in copies if name != MODEL)]


def upload(folder: Path, names: list[str], repo: str, private: bool) -> str:
    """Uploads these files of the folder in one commit; gives the repository's address. Raises PublishError."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        if huggingface_hub.get_token() is None:
            raise PublishError("there is no token; run `hf auth login`, or set HF_TOKEN")
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:  # the Hub does not change one that exists
            raise PublishError(f"{repo} exists and is public; change that in its settings, or leave out --private")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload from train/publish.py",
        )
    except Exception as error:  # PublishError, and whatever huggingface_hub's HTTP and transfer libraries raise
        reason = refusal(error, api.endpoint, repo)
        raise PublishError(f"{folder} is written but not uploaded: {reason}") from error
    return f"{api.endpoint}/{repo}"


def refusal(error: Exception, endpoint: str, repo: str) -> str:
    """Why an upload failed, for the user."""
    if isinstance(error, PublishError):
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{endpoint} refused the token ({status}); it needs the right to write to {repo}"
    return f"{endpoint}: {str(error) or type(error).__name__}"


def publish(options: Publication) -> None:
    """Writes the repository, and uploads it where ``to`` says so. Raises PublishError, CheckpointError and OSError."""
    repo = None if options.to is None else hub_name(options.to)
    model = find_model(options.run, options.best)
    folder = options.folder or model.parent / "hub"
    names = write_repository(options.run, folder, repo, options.best)
    if not options.best and options.run.is_dir() and (options.run / BEST).is_file():
        last, best = (read_description(path).accuracy.get("top1") or 0.0 for path in (model, options.run / BEST))
        if best > last:
            print(f"these weights are the last epoch's, {last:.2f} %; --best takes the best epoch's, {best:.2f} %")
    print(f"{folder}: {', '.join(names)}", flush=True)
    if repo is not None:
        print(upload(folder, names, repo, options.private))


def main() -> int:
    if HELP & set(sys.argv):
        end_with_reader()
    options = tyro.cli(Publication, prog="train/publish.py")
    try:
        publish(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"train/publish.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain/publish.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
