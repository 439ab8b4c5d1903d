"""The page: which control asks for what.

Everything in the tabs Answer, Compare and Look inside hangs on one picture and the chosen models, so all their controls
end in one function, `update`, which answers for what is in view. Bars, heat maps and the opacity slider ask nobody:
page.js moves them.
"""

from pathlib import Path

import gradio as gr
from PIL import Image

from demo import inside, link, live, picking, render
from demo.answers import Answers, Picture, Problem
from demo.guard import guard
from demo.layout import COMPARE, INSIDE, lay_out
from demo.models import Models


def read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


THEME = gr.themes.Default(
    primary_hue="orange",
    neutral_hue="slate",
    font=(gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"),
    font_mono=(gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "monospace"),
)
SCRIPTS = "".join(read(f"{name}.js") for name in ("heat", "live", "link", "card", "many"))
LOOKS = {  # for Blocks.launch
    "theme": THEME,
    # Not as "css", which Gradio rewrites: it would put a selector of its own before each of these.
    "head": f"<style>{read('page.css')}</style><script>{SCRIPTS}</script>",
    "js": read("page.js"),
    "favicon_path": str(Path(__file__).with_name("icon.svg")),
    "footer_links": [],  # the tab API has examples that run here
}
PRIVATE = {"api_visibility": "private"}
# The network uses all cores, so there is one at a time; what takes long waits in a line of its own.
NETWORK = {"concurrency_id": "network", "concurrency_limit": 1}
SLOW = {"concurrency_id": "slow", "concurrency_limit": 2}


def build(models: Models, examples: dict[str, Image.Image]) -> gr.Blocks:
    """The app, to be launched with LOOKS. examples: pictures by name, the first of which it opens with."""
    answers, opening = Answers(models, examples), Picture(next(iter(examples)))
    answers.view("main", opening, models.default)  # the first run of a network is slow, and the page shows its time
    with gr.Blocks(title=link.TITLE, analytics_enabled=False) as page:
        ui = lay_out(page, answers, opening, SLOW, NETWORK)
        connect(page, ui, answers)
    answer_live = live.route(answers)
    guard(page, {"/live": lambda app: answer_live, "/preview.jpg": link.preview, "/": link.page})
    return page


def connect(page: gr.Blocks, ui, answers: Answers) -> None:
    """The events of the page but for those of the tabs Batch and API, which connect their own."""
    in_view = [ui.problem, ui.picture, ui.stage, ui.bars, ui.json, ui.side_a, ui.side_b, ui.looked, ui.block]
    in_view += [ui.shown_models, ui.shown_block, ui.offer, ui.agreement]
    pickers = [ui.model, ui.model_a, ui.model_b]
    selected = [ui.own, ui.tab, *pickers, ui.look]
    # Not ui.block, which refuses its old value once another model has fewer blocks.
    chosen = [*selected, ui.shown_block]

    def update(picture: Picture | dict, own, tab, model, model_a, model_b, look, block) -> dict:
        """What is in view, for this picture and the models that are chosen. A problem leaves it as it was."""
        try:
            picture = picture if isinstance(picture, Picture) else Picture.of_value(picture)
            stage, bars, answer = answers.view("main", picture, model, own)
            shown = {ui.problem: "", ui.picture: picture.as_value(), ui.stage: stage, ui.bars: bars, ui.json: answer}
            shown |= {ui.offer: answers.offer(model, own), ui.shown_models: [model, model_a, model_b]}
            if tab == COMPARE:
                sides = answers.compare(picture, model_a, model_b, own)
                shown |= zip((ui.agreement, ui.side_a, ui.side_b), sides, strict=True)
            if tab == INSIDE:
                depth = answers.classifier(model, own).config.depth
                block = min(max(block, 1), depth)
                shown[ui.looked] = inside.look(answers, picture, model, own, look, block)
                shown[ui.block] = gr.update(maximum=depth, value=block, visible=look == inside.DEPTHWISE)
                shown[ui.shown_block] = block
            return shown
        except Problem as problem:
            return {ui.problem: render.problem(str(problem))}

    def update_upload(upload, *others) -> dict:
        if upload is None:
            return {ui.problem: gr.skip()}
        return update(Picture(upload.name, upload.path), *others)

    def update_example(event: gr.EventData, *others) -> dict:
        return update(Picture(event.name), *others)

    def update_link(event: gr.EventData, own, tab, model, *others) -> dict:
        """What an address says: an example, and a model."""
        model = event.model if event.model in answers.models.names() else model
        return update(Picture(str(event.name)), own, tab, model, *others) | {ui.model: model}

    def update_row(event: gr.EventData, *others) -> dict:
        """One of many pictures, by the name and the file of its row."""
        return update({"name": event.name, "file": event.file}, *others)

    def update_block(event: gr.EventData, picture, *others) -> dict:
        return update(picture, *others[:-1], int(event.name))

    def update_model(shown, picture, own, tab, model, model_a, model_b, *others) -> dict:
        """Unless it is the old one: a dropdown says "input" twice, and again when it loses the focus."""
        if shown == [model, model_a, model_b]:
            return {ui.problem: gr.skip()}
        return update(picture, own, tab, model, model_a, model_b, *others)

    def update_after(problem: str, *others) -> dict:
        """Unless there was a problem, which has to stay in view."""
        return {ui.problem: gr.skip()} if problem else update(*others)

    quick = NETWORK | PRIVATE
    quick |= {"show_progress": "minimal", "show_progress_on": [ui.bars, ui.side_a, ui.side_b, ui.looked]}
    # Each time, and not only while nothing else is under way: an impatient visitor's last choice counts.
    quick |= {"trigger_mode": "multiple"}
    for field in (ui.source, ui.photo):
        field.upload(update_upload, [field, *chosen], in_view, **quick)
    ui.examples.choose(update_example, chosen, in_view, **quick)
    ui.link.choose(update_link, chosen, [*in_view, ui.model], **quick)
    ui.batch.choose(update_row, chosen, in_view, **quick)
    for control in pickers:
        control.input(update_model, [ui.shown_models, ui.picture, *chosen], in_view, **quick)
    ui.look.input(update, [ui.picture, *chosen], in_view, **quick)
    ui.looked.choose(update_block, [ui.picture, *chosen], in_view, **quick)
    # Not "release", which the keyboard does not give.
    ui.block.input(update, [ui.picture, *selected, ui.block], in_view, **quick | {"trigger_mode": "always_last"})
    for tab in (ui.answer_tab, ui.compare_tab, ui.inside_tab):
        turned = tab.select(None, None, ui.tab, js=f"() => {tab.label!r}", **PRIVATE)
        if tab is not ui.answer_tab:  # which is always kept up to date
            turned.then(update, [ui.picture, *chosen], in_view, **quick)

    picked = [ui.problem, ui.own, *pickers, ui.missing]
    offer, fetch, use_own = picking.handlers(answers.models, picked)

    def refresh(own) -> list:
        """What others may have changed since the page was made."""
        return [*offer(own), answers.offer(answers.models.default)]

    page.load(refresh, ui.own, [*pickers, ui.missing, ui.offer], show_progress="hidden", **PRIVATE)
    slow = SLOW | PRIVATE
    fetched = [
        each.choose(fetch, ui.own, picked, show_progress_on=[each], **slow)
        for each in (ui.missing, ui.offer, ui.side_b)
    ]
    added = ui.checkpoint.upload(use_own, [ui.checkpoint, ui.own], picked, show_progress_on=[ui.missing], **slow)
    for event in (*fetched, added):
        event.then(update_after, [ui.problem, ui.picture, *chosen], in_view, **quick)
