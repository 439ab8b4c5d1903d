"""What is on the page, and where. What the controls do is in page.py, how they look in page.css."""

from types import SimpleNamespace

import gradio as gr

from demo import api, inside, many, picking, render
from demo.answers import Answers, Picture
from demo.models import Models

TITLE = """<h1>ConvMixer</h1>
<p>Give it a picture: see what a small neural network makes of it, and where it looked.</p>"""
CONTROLS = """<div class="controls">
<label>Heat map <input id="opacity" type="range" min="0" max="100" value="80"></label>
<div class="kinds" role="radiogroup" aria-label="What the heat map shows">
<label><input type="radio" name="kind" value="for" checked><span>Evidence for</span></label>
<label><input type="radio" name="kind" value="signed"><span>For and against</span></label></div>
<button type="button" id="paint" aria-pressed="false">Cover a part</button>
<p class="hint">Paint over the picture with the mouse or a finger: what you cover counts no more.</p>
<p class="legend"><span data-kind="for">none</span><span data-kind="signed">against</span>
<canvas aria-hidden="true"></canvas><span>strongest<span data-kind="signed"> for</span></span></p></div>"""
CAMERA = """<div class="camera"><button type="button" aria-pressed="false">Use the camera</button>
<span>or drop or paste a picture anywhere</span></div><p class="trouble" role="alert"></p>"""
SAVE = """<button type="button" id="save">Save this answer</button>"""
OWN = "A model.safetensors or .pth.tar of up to 20 MB. For a larger one start this demo with --model FILE."
# A press on a button with data-name becomes the event "choose" of its component, with that name.
CHOOSE = """element.addEventListener('click', event => {
    const button = event.target.closest('button[data-name]');
    if (button) trigger('choose', {name: button.dataset.name});
});"""
RESTORE = "window.restoreView = (view) => trigger('choose', view);"  # for link.js
COMPARE, INSIDE = "Compare", "Look inside"


def html(value: str, elem_id: str, **options) -> gr.HTML:
    """HTML as it stands, without Gradio's styles for running text."""
    return gr.HTML(value, elem_id=elem_id, apply_default_css=False, **options)


def lay_out(page: gr.Blocks, answers: Answers, opening: Picture, slow: dict, network: dict) -> SimpleNamespace:
    """The components, by name, of a page that opens with ``opening`` answered. slow, network: limits of events."""
    models = answers.models
    stage, bars, answer = answers.view("main", opening, models.default)
    ui = SimpleNamespace(own=gr.State([]))
    ui.picture, ui.tab = gr.JSON(opening.as_value(), visible=False), gr.Textbox("Answer", visible=False)
    # What is in view, so that an event which changes nothing can be told.
    ui.shown_models, ui.shown_block = gr.State(None), gr.State(models.get(models.default).config.depth)
    with gr.Row(elem_id="top"):
        html(TITLE, "title")
        ui.model = picking.picker(models, "Model", "model")
    with gr.Row(elem_id="desk"):
        with gr.Column(elem_id="left"):
            ui.stage = html(stage, "stage")
            html(CONTROLS, "controls")
            with gr.Row(elem_id="inputs"):
                with gr.Column(elem_id="photo", min_width=0):  # on a phone its camera, see page.js
                    ui.photo = gr.UploadButton("Take a photo", variant="primary")
                with gr.Column(elem_id="source", min_width=0):
                    ui.source = gr.UploadButton("Choose a picture", variant="primary")
                html(CAMERA, "camera-button")
            ui.examples = html(render.examples(answers.examples), "examples", js_on_load=CHOOSE)
        with gr.Column(elem_id="right"):
            ui.problem = html("", "problem")
            ui.link = html("<i hidden></i>", "link", js_on_load=RESTORE)
            with gr.Tabs(elem_id="tabs"):
                with gr.Tab("Answer", elem_id="tab-answer") as ui.answer_tab:
                    ui.bars = html(bars, "answer")
                    ui.offer = html(answers.offer(models.default), "offer", js_on_load=CHOOSE)
                    html(SAVE, "saving")
                    answer_details(ui, models, answer)
                with gr.Tab(COMPARE, elem_id="tab-compare") as ui.compare_tab:
                    comparison(ui, models)
                with gr.Tab(INSIDE, elem_id="tab-inside") as ui.inside_tab:
                    inspection(ui, models.get(models.default).config.depth)
                with gr.Tab("Batch", elem_id="tab-batch"):
                    many.lay_out(answers, ui, slow)
                with gr.Tab("API", elem_id="tab-api"):
                    api.lay_out(page, answers, network)
    ui.shown_models.value = [ui.model.value, ui.model_a.value, ui.model_b.value]
    return ui


def answer_details(ui: SimpleNamespace, models: Models, answer: dict) -> None:
    with gr.Accordion("As JSON", open=False):
        ui.json = gr.JSON(answer, show_label=False, elem_id="json")
    with gr.Accordion("More models", open=False, elem_id="more"):
        ui.missing = html(render.missing(models.missing()), "missing", js_on_load=CHOOSE)
        ui.checkpoint = gr.UploadButton("Use a checkpoint of your own", size="md", elem_id="checkpoint")
        html(render.note(OWN), "about-checkpoint")


def comparison(ui: SimpleNamespace, models: Models) -> None:
    ui.agreement = html("", "agreement")
    with gr.Row(elem_id="compare"):
        with gr.Column(min_width=150):
            ui.model_a = picking.picker(models, "Model A", "model-a")
            ui.side_a = html("", "side-a")
        with gr.Column(min_width=150):
            ui.model_b = picking.picker(models, "Model B", "model-b", position=1)
            ui.side_b = html("", "side-b", js_on_load=CHOOSE)


def inspection(ui: SimpleNamespace, depth: int) -> None:
    ui.look = gr.Radio(inside.VIEWS, value=inside.VIEWS[0], label="What to look at", container=False, elem_id="look")
    ui.block = gr.Slider(1, depth, value=depth, step=1, label="Block", elem_id="block", visible=False)
    ui.looked = html("", "looked", js_on_load=CHOOSE)
