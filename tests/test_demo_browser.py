"""The page in a real browser: pictures come in, answers are looked at, on any screen and by anyone."""

import json
import re

import demo_browser
import numpy as np
from demo_browser import SECOND, SHIPPED, TABS, decoded, draw, encode, expect, png
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
