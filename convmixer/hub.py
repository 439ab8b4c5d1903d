"""Models on the Hugging Face Hub: which of their files are on this machine, and fetching the others.

huggingface_hub does the fetching, with its cache, tokens, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. It takes 0.4 s to
import. So what every start asks, whether a file is here, is read off the cache's layout:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

import os
from contextlib import suppress
from pathlib import Path

from .download import DownloadError, Progress, progress_bar, reason

PREFIX = "hf:"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def cache_dir() -> Path:
    """The folder in which huggingface_hub, and so timm, keeps what it has fetched; it need not exist."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(folder)))


def cached(repo: str, file: str, revision: str = "main") -> Path | None:
    """Where a file of ``repo``, USER/NAME, is on this machine; None if it is not. Calls no host."""
    folder = cache_dir() / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text(encoding="utf-8")
    except (OSError, ValueError):  # not the name of a branch or tag that has been asked for: a commit, then
        commit = revision
    path = folder / "snapshots" / commit / file
    return path if path.is_file() else None


def fetch(repo: str, revision: str = "main", progress: Progress | None = None, anew: bool = False) -> Path:
    """The weights of ``repo`` as the Hub has them now, with config.json beside them where it has one.

    Where the Hub cannot be reached these are the ones in the cache, if they are there. anew: the file in the cache is
    damaged. Raises DownloadError.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    options = {"cache_dir": cache_dir(), "library_name": "convmixer"}
    try:
        bar = progress_bar(progress)
        path = huggingface_hub.hf_hub_download(
            repo, WEIGHTS, revision=revision, force_download=anew, tqdm_class=bar, **options
        )
        with suppress(EntryNotFoundError):
            commit = Path(path).parent.name
            huggingface_hub.hf_hub_download(repo, CONFIG, revision=commit, tqdm_class=progress_bar(None), **options)
        return Path(path)
    except Exception as error:  # its own, and whatever its HTTP and transfer libraries raise
        raise DownloadError(f"{PREFIX}{repo}: {_explain(error, revision)}") from error


def _explain(error: Exception, revision: str) -> str:
    from huggingface_hub import errors

    for kind, line in (
        (errors.GatedRepoError, "its owner must let you in: ask on its page, and run `hf auth login` or set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "there is none, or it is private: run `hf auth login`, or set HF_TOKEN"),
        (errors.RevisionNotFoundError, f"it has no revision {revision!r:.80}"),
        (errors.RemoteEntryNotFoundError, f"it holds no {WEIGHTS}"),
    ):
        if isinstance(error, kind):
            return line
    is_elsewhere = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None
    return reason(error.__cause__ if is_elsewhere else error)
