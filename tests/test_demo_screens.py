"""The page in a real browser: on any screen, in any colours, for several visitors, and by axe-core's rules."""

import io
import re
from pathlib import Path

import demo_browser
import numpy as np
import pytest
from demo_browser import LAPTOP, PHONE, SECOND, TABS, Visitor, draw, encode, expect, png
from PIL import Image

app, browser, visitors, visitor = demo_browser.FIXTURES


def test_on_a_phone_the_answer_is_in_view_and_nothing_is_too_wide(visitors):
    visitor = visitors(**PHONE)
    for tab in TABS:
        expect(visitor.page.get_by_role("tab", name=tab, exact=True)).to_be_in_viewport(ratio=1)
    expect(visitor.page.get_by_role("button", name="More tabs")).to_be_hidden()
    camera, files = visitor.find('#photo input[type="file"]'), visitor.find('#source input[type="file"]')
    for button in ("Take a photo", "Choose a picture"):
        expect(visitor.page.get_by_role("button", name=button)).to_be_in_viewport(ratio=1)
    assert [each.get_attribute("capture") for each in (camera, files)] == ["environment", None]
    visitor.give('#photo input[type="file"]', {"high.png": encode(draw(1, 200, 300))})
    visitor.sees_picture("high.png")
    expect(visitor.find("#answer .bar").first).to_be_in_viewport(ratio=1)
    visitor.page.set_viewport_size({"width": 390, "height": 664})  # what a browser's own bars leave
    expect(visitor.find("#answer .best")).to_be_in_viewport(ratio=1)
    visitor.unfold("As JSON")
    visitor.unfold("More models")
    for tab in TABS:
        visitor.turn_to(tab)
        visitor.waits_for_the_tab(tab)
        widths = visitor.page.evaluate("[document.documentElement.scrollWidth, innerWidth, visualViewport.width]")
        assert widths == [390, 390, 390], tab
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
    assert visitor.find("#right").bounding_box()["width"] > 0.7 * width


@pytest.mark.parametrize("colours", ["none", "active"])
def test_pressed_hovered_and_focused_differ(visitors, colours):
    visitor = visitors(forced_colors=colours)
    for selector in (".bar >> nth=1", ".kinds label >> nth=1"):
        target, states = visitor.find(selector), []
        states.append(visitor.picture_of(target))
        target.hover()
        states.append(visitor.picture_of(target))
        visitor.page.mouse.move(2, 2)
        visitor.page.keyboard.press("Tab")  # so that focus is shown
        (target if "bar" in selector else target.locator("input")).focus()
        states.append(visitor.picture_of(target))
        target.click()
        visitor.page.mouse.move(2, 2)
        target.evaluate("() => document.activeElement.blur()")
        states.append(visitor.picture_of(target))
        assert len(set(states)) == 4, selector
    expect(visitor.find(".kinds input").nth(1)).to_be_checked()


def test_dark_and_light_follow_the_system(visitors):
    visitor = visitors(color_scheme="dark")
    assert brightness(visitor) < 60
    ink = visitor.find("#answer .bar .label").first.evaluate("element => getComputedStyle(element).color")
    assert min(map(int, re.findall(r"\d+", ink))) > 180
    visitor.page.emulate_media(color_scheme="light")
    expect(visitor.find("body:not(.dark)")).to_be_attached()
    assert brightness(visitor) > 200


def brightness(visitor: Visitor) -> float:
    """Of the page's background in the corner, from 0 to 255, as it is painted."""
    corner = {"x": 0, "y": 700, "width": 20, "height": 20}
    return np.asarray(Image.open(io.BytesIO(visitor.page.screenshot(clip=corner))).convert("L")).mean()


def test_visitors_do_not_see_each_others_pictures(visitors):
    anna = visitors()
    anna.upload("anna.png", png(1))
    anna.sees_answer("anna.png", png(1))
    boris = visitors()
    boris.sees_picture("bird")
    boris.upload("boris.png", png(2))
    boris.sees_answer("boris.png", png(2))
    anna.turn_to("Compare")
    anna.sees_answer("anna.png", png(1), SECOND, view="b")
    boris.choose(SECOND)
    boris.sees_answer("boris.png", png(2), SECOND)
    assert "boris.png" not in anna.page.content() and "anna.png" not in boris.page.content()


# Accessibility, by axe-core.

GRADIO = (
    # The code editor's own colours, and its panes, which a keyboard cannot scroll.
    ".cm-editor",
)


@pytest.mark.parametrize("screen", ["laptop", "phone"])
def test_axe_finds_nothing_serious(visitors, screen):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    visitor = visitors(**(PHONE if screen == "phone" else LAPTOP), reduced_motion="reduce")
    visitor.page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8"))
    visitor.unfold("As JSON")
    visitor.unfold("More models")
    found = []
    for tab in TABS:
        visitor.turn_to(tab)
        visitor.waits_for_the_tab(tab)
        # The colours are the same on a phone.
        found += violations(
            visitor, tab, {} if screen == "laptop" else {"rules": {"color-contrast": {"enabled": False}}}
        )
        if screen == "laptop":
            visitor.page.emulate_media(color_scheme="dark")
            expect(visitor.find("body.dark")).to_be_attached()
            found += violations(visitor, f"{tab}, dark", {"runOnly": ["color-contrast"]})
            visitor.page.emulate_media(color_scheme="light")
            expect(visitor.find("body:not(.dark)")).to_be_attached()
    assert not found, "\n".join(found)


def violations(visitor: Visitor, where: str, options: dict) -> list[str]:
    visitor.page.wait_for_function("document.getAnimations().every(each => each.playState !== 'running')")
    script = "([exclude, options]) => axe.run({exclude}, {...options, resultTypes: ['violations']})"
    result = visitor.page.evaluate(script, [[[each] for each in GRADIO], options])
    return [
        f"{where}: {violation['impact']}: {violation['id']}: {node['target']}: {node['failureSummary']:.300}"
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
