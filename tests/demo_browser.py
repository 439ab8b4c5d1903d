"""The demo in a real browser: Chromium, and visitors who do what people do on the page.

A test module takes the fixtures from FIXTURES. Each visitor has a browser context of its own, and at the end of a test
nothing may have gone wrong for any of them: no request to elsewhere, no error, toast or dialog.
"""

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import demo_client
import numpy as np
import pytest
from demo_client import SHIPPED, Served
from PIL import Image

try:
    from playwright.sync_api import Locator, Page, expect, sync_playwright
except ImportError:
    expect = sync_playwright = None

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
)
LAPTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
TABS = ("Answer", "Compare", "Look inside", "Batch", "API")
# What Gradio says of a page that is left while it waits for an answer.
LEFT = ("AbortError: signal is aborted without reason", "Unexpected error Connection errored out")
# Remembers what the page shows only for a while: Gradio's toasts, and the pill "Error" over a component.
WITNESS = """window.troubles = [];
new MutationObserver(() => {
    for (const each of document.querySelectorAll('[data-testid="toast-body"], [data-testid="status-tracker"] .error'))
        if (!each.dataset.seen) each.dataset.seen = window.troubles.push(each.textContent.trim());
}).observe(document, {subtree: true, childList: true});"""
TRANSFER = """([kind, name, data, onto]) => {
    const transfer = new DataTransfer(), options = {bubbles: true, cancelable: true};
    transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type: "image/png"}));
    document.querySelector(onto).dispatchEvent(kind === "drop"
        ? new DragEvent(kind, {dataTransfer: transfer, ...options})
        : new ClipboardEvent(kind, {clipboardData: transfer, ...options}));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if sync_playwright is None:
        pytest.skip("playwright is not installed")
    names = (os.environ.get("CONVMIXER_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("there is no Chromium on the PATH (CONVMIXER_CHROMIUM names one)")
    with sync_playwright() as playwright:
        expect.set_options(timeout=30_000)
        running = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture
def visitors(browser, served) -> Iterator[Callable[..., "Visitor"]]:
    """A function that opens the page for one more visitor; options are those of a browser context."""
    there = []

    def come(**options) -> Visitor:
        visitor = Visitor(served, browser.new_context(**LAPTOP | options).new_page())
        there.append(visitor)
        visitor.open()
        return visitor

    yield come
    for visitor in there:
        troubles = visitor.troubles + visitor.page.evaluate("window.troubles")
        visitor.page.context.close()
        assert [each for each in troubles if each not in visitor.expected_troubles] == []


@pytest.fixture
def visitor(visitors) -> "Visitor":
    """Somebody at a laptop, who has just opened the page."""
    return visitors()


FIXTURES = demo_client.served, browser, visitors, visitor


@dataclass
class Visitor:
    """What somebody does on the page, and sees."""

    app: Served
    page: "Page"
    troubles: list[str] = field(default_factory=list)
    expected_troubles: list[str] = field(default_factory=list)

    def open(self) -> None:
        context, url = self.page.context, self.app.client.url
        own = (url, "data:", f"blob:{url}")
        context.set_default_timeout(40_000)
        context.add_init_script(WITNESS)
        context.route(re.compile(f"^(?!{re.escape(url)})"), lambda route: route.abort())
        context.on("request", lambda request: self._note("request", request.url, not request.url.startswith(own)))
        context.on("console", lambda message: self._note("console", message.text, message.type == "error"))
        context.on("weberror", lambda error: self._note("error", str(error.error)))
        self.page.on("dialog", lambda dialog: (self._note("dialog", dialog.message), dialog.dismiss()))
        self.page.goto(url, wait_until="commit")
        expect(self.page.locator("html[data-tab]")).to_be_attached()

    def _note(self, kind: str, text: str, is_trouble: bool = True) -> None:
        if is_trouble and not any(words in text for words in LEFT):
            self.troubles.append(f"{kind}: {text:.500}")

    # What is there.

    def find(self, selector: str) -> "Locator":
        return self.page.locator(selector)

    def button(self, name: str | re.Pattern, **options) -> "Locator":
        return self.page.get_by_role("button", name=name, **options)

    def picker(self, name: str = "Model") -> "Locator":
        return self.page.get_by_role("combobox", name=name, exact=True)

    def bar(self, label: str, view: str = "main") -> "Locator":
        return self.find(f'.bar[data-view="{view}"]').filter(has=self.page.get_by_text(label, exact=True))

    def layer(self, view: str = "main") -> "Locator":
        """The heat map that is to be seen."""
        return self.find(f'.stage[data-view="{view}"] .heat').filter(visible=True)

    def width(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth")

    # What people do.

    def turn_to(self, tab: str) -> None:
        """Open it, and wait until all of it is there."""
        self.page.get_by_role("tab", name=tab, exact=True).click()
        expect(self.find(f'html[data-tab="{tab}"]')).to_be_attached()
        last = {"Answer": "#answer .bar", "Compare": "#side-b button", "Look inside": "#looked figure", "Batch": "#csv"}
        expect(self.find(last.get(tab, ".cm-content >> nth=2")).first).to_be_visible()
        expect(self.find('[data-testid="status-tracker"]:not(.hide)')).to_have_count(0)

    def upload(self, name: str, data: bytes) -> None:
        self.give('#source input[type="file"]', {name: data})

    def upload_checkpoint(self, name: str, data: bytes) -> None:
        self.give('input[data-testid="Use a checkpoint of your own-upload-button"]', {name: data})

    def give(self, field: str, files: dict[str, bytes] | Path) -> None:
        """files: by name, or the path of one or of a folder."""
        kind = {"mimeType": "application/octet-stream"}
        if not isinstance(files, Path):
            files = [{"name": name, "buffer": data} | kind for name, data in files.items()]
        self.find(field).set_input_files(files)

    def transfer(self, kind: str, name: str, data: bytes, onto: str = "body") -> None:
        """kind: paste or drop."""
        self.page.evaluate(TRANSFER, [kind, name, base64.b64encode(data).decode(), onto])

    def choose(self, model: str, picker: str = "Model") -> None:
        self.picker(picker).click()
        self.page.get_by_role("option", name=re.compile(f"^(✓ *)?{re.escape(model)}( ·|$)")).click()
        expect(self.page.get_by_role("option")).to_have_count(0)  # the list fades away

    # What people see.

    def sees_picture(self, name: str, view: str = "main") -> None:
        expect(self.find(f'.stage[data-view="{view}"] .picture')).to_have_attribute("alt", name)

    def sees_answer(self, name: str, picture: bytes | Image.Image, model=SHIPPED, view="main", path=None) -> None:
        """The picture, its bars and its heat maps are the classifier's; path: of a checkpoint of the visitor's own."""
        from convmixer import Classifier
        from demo.heat import grids
        from demo.words import percent

        classifier = Classifier(path) if path else self.app.models.get(model)
        predictions, maps = classifier.classify_with_heatmaps(picture, 5)
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

    def sees_problem(self, *words: str) -> None:
        """One sentence, which has all these words."""
        alert = self.page.get_by_role("alert")
        expect(alert).to_have_count(1)
        for each in words:
            expect(alert).to_contain_text(each)
        expect(alert).to_have_text(re.compile(r"^[^\n]+[^.]\.$"))

    def sees_no_problem(self) -> None:
        expect(self.page.get_by_role("alert")).to_have_count(0)


def decoded(url: str) -> Image.Image:
    """The picture in a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))
