"""The page in a real browser: pictures come in, answers are looked at, on any screen and by anyone."""

import io
import json
import re
from pathlib import Path

import demo_browser
import numpy as np
import pytest
from demo_browser import LAPTOP, PHONE, SECOND, SHIPPED, TABS, Visitor, decoded, draw, encode, expect, png
from PIL import Image
from test_images import png_bomb

app, browser, visitors, visitor = demo_browser.FIXTURES


def test_what_must_not_happen_would_be_seen(visitor):
    visitor.page.evaluate("""async () => {
        await fetch("http://nothing.invalid/").catch(() => 0);
        alert("seen");
        console.error("seen");
        setTimeout(() => {
            document.body.insertAdjacentHTML("beforeend", '<div data-testid="toast-body">seen</div>');
            throw new Error("seen");
        });
    }""")
    visitor.page.wait_for_function("window.troubles.length > 0")
    seen = visitor.expected_troubles = visitor.troubles + visitor.page.evaluate("window.troubles")
    for kind in ("request: http://nothing.invalid/", "dialog: seen", "console: seen", "error: seen", "seen"):
        assert any(trouble.startswith(kind) for trouble in seen), (kind, seen)


# The opening.


def test_the_page_opens_with_an_answer(visitor):
    name, picture = next(iter(visitor.app.examples.items()))
    visitor.sees_answer(name, picture)
    visitor.sees_heat_map_of(visitor.app.answer(picture)[0][0].label)
    visitor.sees_no_problem()


def test_whoever_cannot_see_the_page_is_told_what_there_is(visitor):
    expect(visitor.page.locator("body")).to_match_aria_snapshot("""
        - heading "ConvMixer" [level=1]
        - combobox "Model"
        - figure:
          - img "bird"
          - text: /^Strong evidence for bird, most of it in the/
        - slider "Heat map"
        - radiogroup "What the heat map shows":
          - radio "Evidence for" [checked]
          - radio "For and against"
        - group "Example pictures":
          - 'button "Example: bird"'
        - tablist:
          - tab "Answer" [selected]
          - tab "Compare"
          - tab "Look inside"
          - tab "Batch"
          - tab "API"
        - tabpanel:
          - region "Answer of convmixer_256_8_cifar10":
            - status:
              - paragraph: /The answer is bird .*%/
            - list:
              - listitem:
                - button /bird/ [pressed]
              - listitem:
                - button /%/
    """)
    for tab in TABS:
        visitor.turn_to(tab)
        visitor.waits_for_the_tab(tab)
        pictures = visitor.find("img").filter(visible=True).all()
        assert all(picture.get_attribute("alt") is not None for picture in pictures)


# A picture comes in.


def test_an_upload_is_answered_and_then_the_next(visitor):
    visitor.unfold("As JSON")
    for name, data in (("first.png", png(1)), ("second.jpg", encode(draw(2, 300, 200), "JPEG"))):
        visitor.upload(name, data)
        visitor.sees_answer(name, data)
        expect(visitor.find("#answer .about p")).to_have_text(
            re.compile(rf"^It sees no more than these 32 × 32 pixels; {SHIPPED} answered in \d+ ms\.$")
        )
        expect(visitor.find("#json")).to_contain_text(name)
        shown = json.loads(visitor.find("#json .json-holder").inner_text())
        expected = [vars(prediction) for prediction in visitor.app.answer(data)[0]]
        assert shown.pop("seconds") > 0
        assert (shown.pop("engine"), shown.pop("precision")) == ("kernel", "float32")
        assert shown == {"image": name, "model": SHIPPED, "predictions": expected}
    visitor.sees_no_problem()


def test_a_photograph_of_a_dog_is_a_dog(visitor, photos):
    data = (photos / "dog.jpg").read_bytes()
    visitor.upload("dog.jpg", data)
    visitor.sees_answer("dog.jpg", data)
    expect(visitor.find("#answer .best")).to_have_text(re.compile("^The answer is dog "))


def test_an_answer_is_small(visitor, photos):
    network, urls, received = visitor.page.context.new_cdp_session(visitor.page), {}, []
    network.send("Network.enable")
    network.on("Network.requestWillBeSent", lambda event: urls.update({event["requestId"]: event["request"]["url"]}))
    network.on("Network.dataReceived", lambda event: received.append((event["requestId"], event["dataLength"])))
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    pictures = {"pizza.jpg": (photos / "pizza.jpg").read_bytes(), "noise.png": encode(Image.fromarray(noise))}
    for name, data in pictures.items():
        with visitor.waits_for_the_server():
            visitor.upload(name, data)
        visitor.sees_picture(name)
        assert 5_000 < sum(size for request, size in received if "/gradio_api/" in urls.get(request, "")) < 60_000, name
        received.clear()


def test_every_example_is_answered(visitor):
    for name, picture in reversed(visitor.app.examples.items()):
        visitor.page.get_by_role("button", name=f"Example: {name}").click()
        visitor.sees_answer(name, picture)


def test_a_picture_is_pasted_or_dropped_anywhere(visitor):
    visitor.paste("pasted.png", png(3))
    visitor.sees_answer("pasted.png", png(3))
    for number, place in enumerate(("#title h1", "#stage .picture", "#source button", "#answer .bar")):
        visitor.drop(f"dropped {number}.png", png(4 + number), onto=place)
        visitor.sees_answer(f"dropped {number}.png", png(4 + number))
    assert visitor.page.url == visitor.app.url


# Its heat maps.


def test_a_bar_shows_the_heat_map_of_its_class_and_hides_it_again(visitor):
    predictions, _ = visitor.app.answer(visitor.app.examples["bird"])
    for prediction in predictions[1:3]:
        visitor.bar(prediction.label).click()
        visitor.sees_heat_map_of(prediction.label)
    visitor.bar(predictions[2].label).click()
    expect(visitor.layer()).to_have_count(0)
    expect(visitor.find("#stage .picture")).to_have_css("filter", "none")
    expect(visitor.find('.bar[aria-pressed="true"]')).to_have_count(0)
    visitor.bar(predictions[0].label).click()
    visitor.sees_heat_map_of(predictions[0].label)


def test_how_the_heat_map_is_shown_lasts_over_the_next_picture(visitor):
    visitor.page.get_by_label("Heat map", exact=True).fill("35")
    expect(visitor.layer()).to_have_css("opacity", "0.35")
    visitor.sees_legend("none strongest")
    visitor.page.get_by_text("For and against").click()
    visitor.sees_legend("against strongest for")
    visitor.sees_heat_map_of("bird", signed=True)
    visitor.upload("next.png", png(1))
    visitor.sees_answer("next.png", png(1))
    predictions, _ = visitor.app.answer(png(1))
    visitor.sees_heat_map_of(predictions[0].label, signed=True)
    expect(visitor.layer()).to_have_css("opacity", "0.35")
    visitor.page.get_by_text("Evidence for", exact=True).click()
    visitor.sees_heat_map_of(predictions[0].label)


def test_without_a_mouse(visitor):
    keyboard, passed = visitor.page.keyboard, []
    for _ in range(60):
        keyboard.press("Tab")
        passed.append(visitor.page.evaluate("document.activeElement.id || document.activeElement.className"))
        focused = visitor.page.locator(":focus")
        if passed[-1] == "opacity":
            keyboard.press("ArrowLeft")
            keyboard.press("ArrowLeft")
            expect(visitor.layer()).to_have_css("opacity", "0.78")
        elif focused.get_attribute("name") == "kind":
            keyboard.press("ArrowRight")
            visitor.sees_heat_map_of("bird", signed=True)
        elif passed[-1] == "bar" and passed.count("bar") == 2:
            assert "3px" in focused.evaluate("element => getComputedStyle(element).outline")
            label = focused.locator(".label").inner_text()
            keyboard.press("Enter")
            break
    assert "opacity" in passed and passed.count("bar") == 2, passed
    visitor.sees_heat_map_of(label, signed=True)
    keyboard.press("Space")
    expect(visitor.layer()).to_have_count(0)
    visitor.page.get_by_role("combobox", name="Model", exact=True).focus()
    for key in ("ArrowDown", "Enter"):
        keyboard.press(key)
    visitor.sees_answer("bird", visitor.app.examples["bird"], SECOND)


# Files that are no pictures, and odd ones that are.

JPEG = encode(draw(5, 400, 300), "JPEG")
BAD = {
    "Empty.png": (b"", "empty"),
    "Text.png": (b"I am not a picture.\n" * 20, "cannot be read as a picture"),
    "Notes.txt": (b"hello", "cannot be read as a picture"),
    "Drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "cannot be read"),
    "Paper.pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "cannot be read as a picture"),
    "Phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "supported formats are JPEG"),
    "Cut.jpg": (JPEG[: len(JPEG) // 2], "damaged or cut short"),
    "Page.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as a picture"),
    "Bomb.png": (png_bomb(20_000), "20000 x 20000 pixels"),
    "Large.png": (png_bomb(10_000), "10000 x 10000 pixels"),
    "<img src=x onerror=alert(1)> späß ${1+1} {{x}} 图.png": (b"x", "cannot be read as a picture"),
}


def test_a_file_that_is_no_picture_is_named_with_the_reason(visitor):
    before = visitor.app.examples["bird"]
    for name, (data, reason) in BAD.items():
        visitor.upload(name, data)
        visitor.sees_problem(name, reason)
    visitor.sees_answer("bird", before)
    visitor.paste("Pasted.png", b"hello")
    visitor.sees_problem("Pasted.png")
    visitor.upload("good.png", png(1))
    visitor.sees_answer("good.png", png(1))
    visitor.sees_no_problem()


def test_a_file_over_the_limit_is_named_and_the_next_one_answered(visitor):
    visitor.expected_troubles.append('Error   × File(s) exceed the maximum allowed size of 20.0 Mb: "Huge.png"')
    visitor.drop("Huge.png", 20 * 2**20 + 1, onto="#stage .picture")
    expect(visitor.page.get_by_text("Huge.png")).to_be_visible()
    visitor.upload("good.png", png(1))
    visitor.sees_answer("good.png", png(1))


def turned() -> bytes:
    """A picture, red above and blue below, that lies on its side and says so."""
    picture = Image.new("RGB", (60, 100), "blue")
    picture.paste("red", (0, 0, 60, 50))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    return encode(picture.transpose(Image.Transpose.ROTATE_90), exif=exif)


def test_odd_pictures_are_answered(visitor):
    grey = Image.fromarray(np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64))
    clear = draw(6).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    odd = {
        "sixteen bits.png": encode(grey),
        "see through.png": encode(clear),
        "one pixel.png": encode(draw(7, 1, 1)),
        "one row.png": encode(draw(7, 3000, 1)),
        "späß & <b>图</b>.png".replace("/", ""): png(8),
        "turned.png": turned(),
    }
    for name, data in odd.items():
        visitor.upload(name, data)
        visitor.sees_answer(name, data)
        visitor.sees_no_problem()
        expect(visitor.find("#stage .picture")).to_be_in_viewport()
    shown = decoded(visitor.find("#stage .picture").get_attribute("src"))
    assert shown.size == (60, 100)
    assert shown.getpixel((30, 10))[0] > 200 and shown.getpixel((30, 90))[2] > 200


# Screens, colours, and other visitors.


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
