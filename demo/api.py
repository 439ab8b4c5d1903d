"""For developers: the named API end points, and how to ask them."""

import time

import gradio as gr
from PIL import Image

from convmixer import Classifier, ImageError
from demo.answers import Answers, Picture, Problem, about_picture, as_json
from demo.guard import Upload

PLACE = "http://127.0.0.1:7860"  # in the snippets, until the browser puts the page's own address there
TO_PLACE = f"""(...codes) => {{
    const place = (location.origin + location.pathname).replace(/\\/$/, "");
    return codes.map(code => code.replaceAll("{PLACE}", place));
}}"""
PYTHON = f'''# pip install gradio_client
from gradio_client import Client, handle_file

client = Client("{PLACE}")
answer = client.predict(handle_file("dog.jpg"), model="auto", top_k=5, api_name="/classify")
for prediction in answer["predictions"]:
    print(prediction["label"], prediction["score"])

print(client.predict(handle_file("dog.jpg"), label="dog", api_name="/heatmap"))  # the path of a picture
print(client.predict(api_name="/models"))'''
CURL = f"""# Upload the picture, ask, read the answer.
FILE=$(curl -s {PLACE}/gradio_api/upload -F files=@dog.jpg | cut -d '"' -f 2)
EVENT=$(curl -s {PLACE}/gradio_api/call/classify -H 'Content-Type: application/json' \\
    -d '{{"data": [{{"path": "'"$FILE"'"}}, "auto", 5]}}' | cut -d '"' -f 4)
curl -sN {PLACE}/gradio_api/call/classify/$EVENT"""
JAVASCRIPT = f'''// npm install @gradio/client, then save this as ask.mjs: node ask.mjs
import {{ readFile }} from "node:fs/promises";
import {{ Client }} from "@gradio/client";

const client = await Client.connect("{PLACE}");
const picture = new Blob([await readFile("dog.jpg")]); // in a browser: the file of an <input type="file">
const answer = await client.predict("/classify", {{ image: picture, model: "auto", top_k: 5 }});
console.log(answer.data[0].predictions);
process.exit(); // else the client keeps listening'''
END_POINTS = """<ul class="end-points">
<li><code>/classify</code> image, model = "auto", top_k = 5: the best classes, with scores from 0 to 1</li>
<li><code>/heatmap</code> image, model = "auto", label = the best class: the picture with the evidence over it</li>
<li><code>/models</code> the models on this machine</li></ul>"""
MAX_TOP_K = 1000
MAX_SHOWN = 1000  # pixels of a heat map's longer side


def lay_out(page: gr.Blocks, answers: Answers, limits: dict) -> None:
    """The tab, and the end points, whose inputs and outputs are not on the page."""
    gr.HTML(END_POINTS, elem_id="end-points", apply_default_css=False)
    snippets = (("Python", "python", PYTHON), ("curl", "shell", CURL), ("JavaScript", "javascript", JAVASCRIPT))
    codes = [
        gr.Code(code, language=kind, label=label, interactive=False, wrap_lines=True) for label, kind, code in snippets
    ]
    page.load(None, codes, codes, js=TO_PLACE, api_visibility="private")
    with gr.Column(visible=False):
        image = gr.Image(label="image")
        model = gr.Textbox("auto", label="model")
        label = gr.Textbox("", label="label")
        top_k = gr.Number(5, label="top_k")
        answer, seen, names = gr.JSON(), gr.Image(format="png"), gr.JSON()
        ask = gr.Button()

    def classify(image, model="auto", top_k=5):
        """Classify a picture with ConvMixer.

        Args:
            image: the picture, as a file uploaded to this server or as a data URL
            model: a model on this machine, as /models gives them; auto is the default one
            top_k: how many classes to return, the best first; from 1 on
        """
        if not isinstance(top_k, int | float) or not 1 <= top_k <= MAX_TOP_K or top_k != int(top_k):
            raise failure(f"top_k is {top_k!r:.40}; it must be a whole number from 1 to {MAX_TOP_K}")
        classifier, source = opened(image, model)
        start = time.perf_counter()
        predictions = read(image, lambda: classifier.classify(source, int(top_k)))
        return as_json(answers.models.name(model), classifier, predictions, time.perf_counter() - start)

    def heatmap(image, model="auto", label=""):
        """Show where in a picture ConvMixer sees a class: the picture with the positive evidence laid over it.

        Args:
            image: the picture, as a file uploaded to this server or as a data URL
            model: a model on this machine, as /models gives them; auto is the default one
            label: the class to look for; the best one if empty
        """
        classifier, source = opened(image, model)
        if label and label not in classifier.labels:
            some = ", ".join(classifier.labels[:10]) + (", ..." if len(classifier.labels) > 10 else "")
            raise failure(f"{answers.models.name(model)} has no class {label!r:.80}; it has {some}")
        index = classifier.labels.index(label) if label else None
        picture = read(image, lambda: classifier.heatmap(source, index)).overlay()
        picture.thumbnail((MAX_SHOWN, MAX_SHOWN))
        return picture

    def models():
        """The models on this machine, the default one first."""
        return answers.models.names()

    def opened(image: Upload | None, model: str) -> tuple[Classifier, bytes | Image.Image]:
        if image is None:
            raise failure("there is no image; upload one first")
        try:
            return answers.classifier(model), answers.source(Picture(image.name, image.path))
        except Problem as problem:
            raise failure(str(problem)) from problem

    ask.click(classify, [image, model, top_k], answer, api_name="classify", **limits)
    ask.click(heatmap, [image, model, label], seen, api_name="heatmap", **limits)
    ask.click(models, None, names, api_name="models", concurrency_limit=None)


def read(image: Upload, action):
    """What ``action`` gives; an image that cannot be read becomes one sentence for the client."""
    try:
        return action()
    except ImageError as error:
        raise failure(about_picture(image.name, error)) from error


def failure(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)
