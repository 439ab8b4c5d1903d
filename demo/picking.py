"""Choosing a model, and getting more of them."""

import os
from collections.abc import Sequence

import gradio as gr

from convmixer import CheckpointError, ModelError, hub, zoo
from convmixer.download import DownloadError
from demo import render
from demo.guard import Upload
from demo.models import Models, Own


def choices(models: Models, own: Sequence[Own] = ()) -> list[tuple[str, str]]:
    """What a picker offers: a line about each model that is here, and its name."""
    offered = [(models.describe(name), name) for name in models.names()]
    return [*offered, *((each.name, each.name) for each in own)]


def picker(models: Models, label: str, elem_id: str, position: int = 0) -> gr.Dropdown:
    """A list of the models that are here, with the one at ``position`` chosen, or the last one."""
    offered = choices(models)
    value = offered[min(position, len(offered) - 1)][1]
    return gr.Dropdown(offered, value=value, label=label, filterable=False, container=False, elem_id=elem_id)


def handlers(models: Models, components: list):
    """Three event functions. components: where problems go, the own checkpoints, three pickers, the missing models."""
    problem, own, model, model_a, model_b, missing = components

    def offer(own_now: Sequence[Own]) -> list:
        """The pickers and the missing models as they are now: others may have fetched some."""
        return [gr.update(choices=choices(models, own_now))] * 3 + [render.missing(models.missing())]

    def chosen(name: str, own_now: Sequence[Own]) -> dict:
        """Choose a model that has just come: it answers, and is what the other is compared with."""
        fresh = dict(zip((model, model_a, model_b, missing), offer(own_now), strict=True))
        # One each: Gradio takes the value out of an update that it has used.
        here = {picker: gr.update(choices=choices(models, own_now), value=name) for picker in (model, model_b)}
        return fresh | here | {problem: ""}

    def fetch(event: gr.EventData, own_now: Sequence[Own], progress=gr.Progress()):  # noqa: B008
        """Choose the model whose button was pressed, downloaded if it is not here."""

        def report(done: int, total: int | None) -> None:
            amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"
            progress(done / total if total else None, desc=f"{event.name}: {amount}")

        try:
            if event.name not in models.names():
                models.download(event.name, report)
        except (ModelError, DownloadError) as trouble:
            line = str(trouble)
            for folder in (zoo.cache_dir(), hub.cache_dir()):  # visitors need not know the server's folders
                line = line.replace(f"{folder}{os.sep}", "")
            return {problem: render.problem(line)}
        return chosen(event.name, own_now)

    def use_own(upload: Upload | None, own_now: Sequence[Own]):
        if upload is None:
            return {problem: gr.skip()}
        try:
            added = models.add_own(upload.path, upload.name, own_now)
        except CheckpointError as trouble:
            return {problem: render.problem(str(trouble))}
        return chosen(added.name, [*own_now, added]) | {own: [*own_now, added]}

    return offer, fetch, use_own
