"""The page in a real browser: on any screen, in any colours, by axe's rules, and with a camera."""

from pathlib import Path

import demo_browser
import pytest
from demo_browser import PHONE, TABS, Visitor, decoded, expect
from demo_client import SECOND, draw, encode, png
from PIL import Image

served, browser, visitors, visitor = demo_browser.FIXTURES
SETTLED = "document.getAnimations().every(each => each.playState !== 'running')"


def test_on_a_phone_the_answer_is_in_view_and_nothing_is_too_wide(visitors):
    visitor = visitors(**PHONE)
    for each in [
        *(visitor.page.get_by_role("tab", name=tab, exact=True) for tab in TABS),
        visitor.button("Choose a p"),
    ]:
        expect(each).to_be_in_viewport(ratio=1)
    expect(visitor.button("Take a photo")).to_be_in_viewport(ratio=1)
    expect(visitor.find("#photo input")).to_have_attribute("capture", "environment")
    visitor.give("#photo input", {"high.png": encode(draw(1, 200, 300))})
    visitor.sees_picture("high.png")
    expect(visitor.find("#answer .bar").first).to_be_in_viewport(ratio=1)
    visitor.page.set_viewport_size({"width": 390, "height": 664})  # what a browser's own bars leave
    expect(visitor.find("#answer .best")).to_be_in_viewport(ratio=1)
    for more in ("As JSON", "More models"):
        visitor.button(more).click()
    for tab in TABS:
        visitor.turn_to(tab)
        assert visitor.width() == visitor.page.evaluate("visualViewport.width") == 390, tab
        small = visitor.page.evaluate("""[...document.querySelectorAll("button, [role=tab], #look label, .kinds label")]
            .filter(each => each.checkVisibility() && !each.closest(".json-holder .toggle, [aria-hidden=true]"))
            .map(each => [each.textContent.trim(), each.getBoundingClientRect()])
            .filter(([_, box]) => box.width && Math.min(box.width, box.height) < 43.5).map(([text]) => text)""")
        assert not small, (tab, small)


@pytest.mark.parametrize("width, height", [(1280, 720), (1920, 1080)])
def test_the_room_is_used(visitors, width, height):
    visitor = visitors(viewport={"width": width, "height": height})
    box = visitor.find("#stage .frame").bounding_box()
    assert box["height"] > 0.55 * height and box["width"] > 0.4 * width
    for selector in ("#examples", "#inputs", "#answer", "#offer button"):
        expect(visitor.find(selector)).to_be_in_viewport(ratio=1)
    visitor.turn_to("Compare")
    expect(visitor.find("#side-b .bar").first).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("colours", ["none", "active"])
def test_pressed_hovered_and_focused_differ(visitors, colours):
    visitor = visitors(forced_colors=colours)
    bar, mouse = visitor.find(".bar").nth(1), visitor.page.mouse
    box = bar.bounding_box()
    around = {"x": box["x"] - 6, "y": box["y"] - 6, "width": box["width"] + 12, "height": box["height"] + 12}

    def look() -> bytes:
        visitor.page.wait_for_function(SETTLED)
        return visitor.page.screenshot(clip=around)

    states = [look()]
    bar.hover()
    states.append(look())
    mouse.move(2, 2)
    visitor.page.keyboard.press("Tab")  # so that focus is shown
    bar.focus()
    states.append(look())
    bar.click()
    mouse.move(2, 2)
    bar.blur()
    states.append(look())
    assert len(set(states)) == 4


# Accessibility, by axe-core; but the code editor is Gradio's: its colours, and panes that a keyboard cannot scroll.
AXE = "options => axe.run({exclude: [['.cm-editor']]}, {...options, resultTypes: ['violations']})"


def test_axe_finds_nothing_serious_in_light_and_dark(visitors):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    visitor = visitors(reduced_motion="reduce")
    visitor.page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    for more in ("As JSON", "More models"):
        visitor.button(more).click()
    for tab in TABS:
        visitor.turn_to(tab)
        for scheme, options in (("dark", {"runOnly": ["color-contrast"]}), ("light", {})):
            visitor.page.emulate_media(color_scheme=scheme)
            expect(visitor.find("body.dark")).to_have_count(int(scheme == "dark"))
            visitor.page.wait_for_function(SETTLED)
            found = visitor.page.evaluate(AXE, options)["violations"]
            serious = [each for each in found if each["impact"] in ("serious", "critical")]
            assert not serious, (tab, scheme, serious)


# What moves.


def wait_for_live_answers(visitor: Visitor, count: int) -> None:
    visitor.page.evaluate("performance.clearResourceTimings()")  # of which there may be 250
    so_far = "performance.getEntriesByType('resource').filter(each => each.name.includes('/live?')).length"
    visitor.page.wait_for_function(f"{so_far} >= {count}")


def test_the_camera_answers_as_it_moves_and_a_frozen_frame_is_a_picture(visitors):
    visitor = visitors(permissions=["camera"])
    visitor.button("Use the camera").click()
    expect(visitor.find("#stage video")).to_be_visible()
    wait_for_live_answers(visitor, 5)
    before = visitor.find("#stage .stage").get_attribute("data-heat")
    wait_for_live_answers(visitor, 20)
    assert visitor.find("#stage .stage").get_attribute("data-heat") != before  # the browser's camera shows a clock
    visitor.choose(SECOND)
    expect(visitor.find("#answer .bar .label").first).to_contain_text(SECOND)
    wait_for_live_answers(visitor, 3)
    expect(visitor.find("#answer .bar .label").first).to_contain_text(SECOND)
    visitor.button("Freeze").click()
    visitor.sees_picture("camera.jpg")
    expect(visitor.find("#stage video")).to_have_count(0)
    assert min(decoded(visitor.find("#stage .picture").get_attribute("src")).size) > 200
    visitor.button("Use the camera").click()
    wait_for_live_answers(visitor, 2)
    visitor.transfer("paste", "after.png", png(8))  # whatever comes in ends it
    visitor.sees_answer("after.png", png(8), SECOND)
    expect(visitor.button("Use the camera")).to_be_visible()


MIDDLE_OF_PAINT = """paper => {
    const { data, width, height } = paper.getContext("2d").getImageData(0, 0, paper.width, paper.height);
    let n = 0, x = 0, y = 0;
    for (let i = 0; i < width * height; i++) if (data[4 * i + 3]) n++, x += i % width, y += Math.floor(i / width);
    return [x / n / width, y / n / height];
}"""


def test_what_is_covered_counts_no_more_until_it_is_bare_again(visitor):
    visitor.upload("mine.png", png(1))
    visitor.sees_answer("mine.png", png(1))
    visitor.button("Cover a part").click()
    box, mouse = visitor.find("#stage .frame").bounding_box(), visitor.page.mouse
    mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    mouse.down()
    assert visitor.find("#stage .paper").evaluate(MIDDLE_OF_PAINT) == pytest.approx([0.5, 0.5], abs=0.03)
    for row in range(6):
        for column in (0.02, 0.98):
            mouse.move(box["x"] + column * box["width"], box["y"] + (row + 0.5) / 6 * box["height"], steps=20)
    mouse.up()
    grey = visitor.app.answer(Image.new("RGB", (60, 40), "#808080"))[0][0].label  # all of it is covered
    expect(visitor.find("#answer .best")).to_contain_text(grey)
    visitor.button("Cover a part").click()
    visitor.sees_answer("mine.png", png(1))


WHY = {
    "insecure": "only over HTTPS or on the machine that runs it",
    "NotFoundError": "finds no camera on this device",
    "NotAllowedError": "does not let this page use the camera",
}


def test_where_there_is_no_camera_the_page_says_why_beside_the_button(visitors):
    visitor = visitors(viewport={"width": 640, "height": 400})  # a laptop at 200 %
    for why, words in reversed(WHY.items()):
        if why == "insecure":  # as at a host name that is not localhost, where a browser has no such object
            visitor.page.evaluate("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
        else:
            error = f"async () => {{ throw new DOMException('', '{why}'); }}"
            visitor.page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = {error}; }}")
        visitor.button("Use the camera").click()
        visitor.sees_problem(words)
        expect(visitor.page.get_by_role("alert")).to_be_in_viewport()
