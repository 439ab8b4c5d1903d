"""The demo in a real browser: a server in this process, Chromium, and visitors who do what people do on the page.

A test module takes the fixtures from FIXTURES. Each visitor has a browser context of its own, and at the end of a test
nothing may have gone wrong for any of them: no request to elsewhere, no error, toast or dialog.
"""

import base64
import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

try:
    from playwright.sync_api import Locator, Page, expect, sync_playwright
except ImportError:
    expect = sync_playwright = None

SHIPPED, SECOND = "convmixer_256_8_cifar10", "second"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
)
LAPTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
TABS = ("Answer", "Compare", "Look inside", "Batch", "API")
# Remembers what the page shows only for a while: Gradio's toasts, and the pill "Error" over a component.
# What Gradio says of a page that is left while it waits for an answer.
LEFT = ("AbortError: signal is aborted without reason", "Unexpected error Connection errored out")
WITNESS = """window.troubles = [];
new MutationObserver(() => {
    for (const each of document.querySelectorAll('[data-testid="toast-body"], [data-testid="status-tracker"] .error'))
        if (!each.dataset.seen) each.dataset.seen = window.troubles.push(each.textContent.trim());
}).observe(document, {subtree: true, childList: true});"""
TRANSFER = """const transfer = new DataTransfer();
const bytes = typeof data === "number" ? new Uint8Array(data) : Uint8Array.from(atob(data), c => c.charCodeAt(0));
transfer.items.add(new File([bytes], name, {type: "image/png"}));"""
PASTE = f"""([name, data]) => {{ {TRANSFER}
    document.dispatchEvent(new ClipboardEvent("paste", {{clipboardData: transfer, bubbles: true, cancelable: true}}));
}}"""
DROP = f"""([name, data, selector]) => {{ {TRANSFER}
    for (const kind of ["dragover", "drop"])
        document.querySelector(selector).dispatchEvent(
            new DragEvent(kind, {{dataTransfer: transfer, bubbles: true, cancelable: true}}));
}}"""


def chromium() -> str:
    """The browser's program; skips the test where there is none."""
    if sync_playwright is None:
        pytest.skip("playwright is not installed")
    names = (os.environ.get("CONVMIXER_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    return found or pytest.skip("there is no Chromium on the PATH (CONVMIXER_CHROMIUM names one)")


@dataclass
class App:
    """The running demo."""

    url: str
    models: object
    examples: dict[str, Image.Image]
    uploads: Path

    def answer(self, picture: bytes | Image.Image, model: str = SHIPPED) -> tuple[list, list]:
        """What the classifier says to this picture by itself: predictions and heat maps."""
        return self.models.get(model).classify_with_heatmaps(picture, 5)


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[App]:
    chromium()
    from demo.app import examples
    from demo.guard import launch_options
    from demo.models import Models
    from demo.page import LOOKS, build

    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVMIXER_CACHE", str(folder / "cache"))
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.delenv("COG_WEIGHTS", raising=False)
        models, pictures = Models([SHIPPED, str(write_checkpoint(folder / "second.safetensors"))]), examples()
        blocks = build(models, pictures)
        blocks.queue(max_size=100)
        _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **launch_options() | LOOKS)
        yield App(url, models, pictures, folder / "uploads")
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser(app):
    with sync_playwright() as playwright:
        expect.set_options(timeout=15_000)
        running = playwright.chromium.launch(executable_path=chromium(), args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture
def visitors(app, browser) -> Iterator[Callable[..., "Visitor"]]:
    """A function that opens the page for one more visitor; options are those of a browser context."""
    there = []

    def come(**options) -> Visitor:
        context = browser.new_context(**LAPTOP | options)
        visitor = Visitor(app, context.new_page())
        there.append(visitor)
        visitor.open()
        return visitor

    yield come
    for visitor in there:
        troubles = visitor.troubles + visitor.page.evaluate("window.troubles")
        visitor.page.context.close()
        unexpected = [trouble for trouble in troubles if trouble not in visitor.expected_troubles]
        assert not unexpected, unexpected


@pytest.fixture
def visitor(visitors) -> "Visitor":
    """Somebody at a laptop, who has just opened the page."""
    return visitors()


FIXTURES = app, browser, visitors, visitor


@dataclass
class Visitor:
    """What somebody does on the page, and sees."""

    app: App
    page: "Page"
    troubles: list[str] = field(default_factory=list)
    expected_troubles: list[str] = field(default_factory=list)

    def open(self) -> None:
        context = self.page.context
        context.set_default_timeout(20_000)
        context.add_init_script(WITNESS)
        context.route(re.compile(f"^(?!{re.escape(self.app.url)})"), lambda route: route.abort())
        context.on("request", self._note_request)
        context.on("console", self._note_message)
        context.on("weberror", lambda error: self.troubles.append(f"error: {error.error}"))
        self.page.on("dialog", self._note_dialog)
        self.page.goto(self.app.url, wait_until="commit")
        expect(self.page.locator("html[data-tab]")).to_be_attached()

    def _note_request(self, request) -> None:
        if not request.url.startswith((self.app.url, "data:", f"blob:{self.app.url}")):
            self.troubles.append(f"request: {request.url:.200}")

    def _note_message(self, message) -> None:
        if message.type == "error" and not any(words in message.text for words in LEFT):
            self.troubles.append(f"console: {message.text:.500} ({message.location['url']:.200})")

    def _note_dialog(self, dialog) -> None:
        self.troubles.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    # What is there.

    def find(self, selector: str) -> "Locator":
        return self.page.locator(selector)

    def bar(self, label: str, view: str = "main") -> "Locator":
        return self.find(f'.bar[data-view="{view}"]').filter(has=self.page.get_by_text(label, exact=True))

    def layer(self, view: str = "main") -> "Locator":
        """The heat map that is to be seen."""
        return self.find(f'.stage[data-view="{view}"] .heat').filter(visible=True)

    # What people do.

    def turn_to(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()
        expect(self.find(f'html[data-tab="{tab}"]')).to_be_attached()

    def unfold(self, accordion: str) -> None:
        self.page.get_by_role("button", name=accordion).click()

    def upload(self, name: str, data: bytes) -> None:
        self.give('#source input[type="file"]', {name: data})

    def upload_checkpoint(self, name: str, data: bytes) -> None:
        self.give('input[data-testid="Use a checkpoint of your own-upload-button"]', {name: data})

    def give(self, field: str, files: dict[str, bytes] | Path) -> None:
        """files: by name, or a folder."""
        kind = {"mimeType": "application/octet-stream"}
        is_folder = isinstance(files, Path)
        chosen = files if is_folder else [{"name": name, "buffer": data} | kind for name, data in files.items()]
        self.find(field).set_input_files(chosen)

    def paste(self, name: str, data: bytes) -> None:
        self.page.evaluate(PASTE, [name, base64.b64encode(data).decode()])

    def drop(self, name: str, data: bytes | int, onto: str) -> None:
        """data: the file, or how many zeros are in it."""
        encoded = data if isinstance(data, int) else base64.b64encode(data).decode()
        self.page.evaluate(DROP, [name, encoded, onto])

    def choose(self, model: str, picker: str = "Model") -> None:
        self.page.get_by_role("combobox", name=picker, exact=True).click()
        self.page.get_by_role("option", name=re.compile(f"^(✓ *)?{re.escape(model)}( ·|$)")).click()
        expect(self.page.get_by_role("option")).to_have_count(0)  # the list fades away

    # What people see.

    def sees_picture(self, name: str, view: str = "main") -> None:
        expect(self.find(f'.stage[data-view="{view}"] .picture')).to_have_attribute("alt", name)

    def sees_answer(self, name: str, picture: bytes | Image.Image, model: str = SHIPPED, view: str = "main") -> None:
        """The picture, its bars and its heat maps are what the classifier gives for it."""
        self._sees(name, *self.app.answer(picture, model), model, view)

    def sees_own_answer(self, name: str, picture: bytes | Image.Image, path: Path, model: str, view="main") -> None:
        """The same for a checkpoint that the visitor has uploaded."""
        from convmixer import Classifier

        self._sees(name, *Classifier(path).classify_with_heatmaps(picture, 5), model, view)

    def _sees(self, name: str, predictions: list, maps: list, model: str, view: str) -> None:
        from demo.heat import grids
        from demo.words import percent

        self.sees_picture(name, view)
        answer = self.find(f'.answer[data-view="{view}"]')
        side = "" if view == "main" else f", side {view.upper()}"
        expect(answer).to_have_attribute("aria-label", f"Answer of {model}{side}")
        texts = [f"{each.label} {percent(each.score)}" for each in predictions]
        expect(answer.locator(".bar")).to_have_text(texts)
        expect(answer.locator(".best")).to_have_text(f"The answer is {texts[0]}")
        stage = self.find(f'.stage[data-view="{view}"]')
        assert json.loads(stage.get_attribute("data-heat")) == grids(predictions, maps)

    def sees_heat_map_of(self, label: str, signed: bool = False, view: str = "main") -> None:
        """One heat map shows, that of this class, painted as its grid says and put in words, and its bar is pressed."""
        pressed = self.find(f'.bar[data-view="{view}"][aria-pressed="true"]')
        expect(pressed.locator(".label")).to_have_text(label)
        layer, index = self.layer(view), pressed.get_attribute("data-index")
        expect(layer).to_have_attribute("data-kind", "signed" if signed else "for")
        expect(layer).to_have_attribute("data-index", index)
        stage = self.find(f'.stage[data-view="{view}"]')
        heat = json.loads(stage.get_attribute("data-heat"))
        expect(stage.locator("figcaption")).to_have_text(heat["maps"][index]["words"])
        values = np.frombuffer(base64.b64decode(heat["maps"][index]["grid"]), np.int8) / 127
        values = values.reshape(heat["rows"], heat["columns"])
        painted = np.asarray(decoded(layer.evaluate("canvas => canvas.toDataURL()")).convert("RGBA"), float) / 255
        step = [size // count for size, count in zip(painted.shape, values.shape, strict=False)]
        red, _, blue, alpha = painted[step[0] // 2 :: step[0], step[1] // 2 :: step[1]].transpose(2, 0, 1)
        expected = (1.5 * abs(values)).clip(max=1) if signed else (2 * values).clip(0, 0.95)
        assert abs(alpha - expected).mean() < 0.03
        if signed:
            assert ((red > blue) == (values > 0))[abs(values) > 0.2].all()

    def sees_legend(self, text: str) -> None:
        assert self.find(".legend").inner_text().split() == text.split()

    def picture_of(self, target: "Locator") -> bytes:
        """What is to be seen of it, with an outline around it."""
        box = target.bounding_box()
        clip = {"x": box["x"] - 6, "y": box["y"] - 6, "width": box["width"] + 12, "height": box["height"] + 12}
        self.page.wait_for_function("document.getAnimations().every(each => each.playState !== 'running')")
        return self.page.screenshot(clip=clip)

    def waits_for_the_tab(self, tab: str) -> None:
        """All of it is there."""
        last = {"Answer": "#answer .bar", "Compare": "#side-b .bar", "Look inside": "#looked figure", "Batch": "#csv"}
        expect(self.find(last.get(tab, ".cm-content >> nth=2")).first).to_be_visible()
        expect(self.find('[data-testid="status-tracker"]:not(.hide)')).to_have_count(0)

    def looks_inside(self) -> str:
        """The pictures of the network's inside; none of them is blank."""
        expect(self.find('[data-testid="status-tracker"]:not(.hide)')).to_have_count(0)
        urls = [picture.get_attribute("src") for picture in self.find("#looked img").all()]
        for url in urls:
            pixels = np.asarray(decoded(url).convert("RGB"))
            assert min(pixels.shape[:2]) > 4 and pixels.std() > 3
        return "".join(urls)

    def downloads_csv(self) -> list[dict]:
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name="Download as CSV").click()
        assert download.value.suggested_filename == "convmixer.csv"
        return list(csv.DictReader(download.value.path().read_text(encoding="utf-8-sig").splitlines()))

    @contextlib.contextmanager
    def waits_for_the_server(self) -> Iterator[None]:
        """Until what was asked inside has been answered, and the page has been painted."""
        answers = "performance.getEntriesByType('resource').filter(each => each.name.includes('/queue/data')).length"
        before = self.page.evaluate(answers)
        yield
        self.page.wait_for_function(f"{answers} > {before}")
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def sees_problem(self, *words: str) -> None:
        """One sentence, which has all these words."""
        alert = self.page.get_by_role("alert")
        expect(alert).to_have_count(1)
        for word in words:
            expect(alert).to_contain_text(word)
        expect(alert).to_have_text(re.compile(r"^[^\n]+[^.]\.$"))

    def sees_no_problem(self) -> None:
        expect(self.page.get_by_role("alert")).to_have_count(0)


def draw(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """A picture of soft colours; another one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(url: str) -> Image.Image:
    """The picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))


def png(seed: int) -> bytes:
    return encode(draw(seed))


def write_checkpoint(path, name: str = SECOND, labels=None, seed: int = 0, size: int = 32, **architecture):
    """A checkpoint of a randomly initialised network; gives its path."""
    import torch

    from convmixer.model import ConvMixer, ConvMixerConfig
    from convmixer.preprocessing import Preprocessing
    from convmixer.weights import Checkpoint, save_checkpoint

    labels = tuple(labels or (f"{name} {index}" for index in range(7)))
    shape = {"dim": 16, "depth": 3, "kernel_size": 5, "patch_size": 2, "num_classes": len(labels)} | architecture
    config = ConvMixerConfig(**shape)
    torch.manual_seed(seed)
    state_dict = ConvMixer(config).state_dict()
    save_checkpoint(path, Checkpoint(name, config, state_dict, labels, Preprocessing(size), {}, {}))
    return path
