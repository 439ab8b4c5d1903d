"""The Hugging Face Hub on this machine, as far as downloads need it."""

import hashlib
import os
import re

import huggingface_hub
from file_server import FileServer, Resource

TOKEN = "hf_of_ada"


class HubServer(FileServer):
    """Serves the repositories that ``add`` makes, the ``private`` ones to who has TOKEN."""

    def __init__(self):
        super().__init__()
        self.private: set[str] = set()

    def add(self, repo: str, revision: str = "main", **files: bytes) -> dict[str, Resource]:
        """A repository with model.safetensors (as ``model``), config.json (as ``config``), or both."""
        commit = hashlib.sha1(repr((repo, revision, files)).encode()).hexdigest()
        added = {}
        for name, body in files.items():
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}
            added[name] = Resource(body, headers=headers)
            file = {"model": "model.safetensors", "config": "config.json"}[name]
            for known_as in (revision, commit):
                self.resources[f"/{repo}/resolve/{known_as}/{file}"] = added[name]
        return added

    def refusal(self, path, headers):
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/[^/]+", path)
        if match is None:
            return super().refusal(path, headers)
        repo, revision = match[1], match[2]
        answers = {path.split("/")[4]: it for path, it in self.resources.items() if path.startswith(f"/{repo}/")}
        if not answers or (repo in self.private and headers.get("Authorization") != f"Bearer {TOKEN}"):
            return 401, {"X-Error-Code": "RepoNotFound"}
        if revision not in answers:
            return 404, {"X-Error-Code": "RevisionNotFound"}
        if path not in self.resources:
            return 404, {"X-Error-Code": "EntryNotFound", **answers[revision].headers}
        return None

    def environment(self, home) -> dict[str, str]:
        """The environment of a process that has this for the Hub, and a cache of its own in ``home``."""
        hidden = ("HF_", "HUGGING", "CONVMIXER_CACHE", "COG_WEIGHTS", "XDG_CACHE_HOME")
        usual = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        return usual | {"HF_ENDPOINT": self.url(""), "HF_HOME": str(home), "HOME": str(home), "NO_PROXY": "127.0.0.1"}


def use(monkeypatch, server: HubServer, home) -> None:
    """Have this process, which has imported huggingface_hub, take ``server`` for the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url(""))
    template = server.url("/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "")
