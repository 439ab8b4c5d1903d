"""The page in a real browser: pictures come in, answers are looked at, kept and sent on."""

import io
import json
import re

import demo_browser
import numpy as np
import pillow_heif
from demo_browser import expect
from demo_client import SECOND, SHIPPED, draw, encode, png
from picture_files import png_bomb
from PIL import Image

served, browser, visitors, visitor = demo_browser.FIXTURES


def test_the_page_opens_with_an_answer_and_can_be_heard(visitor):
    name, picture = next(iter(visitor.app.examples.items()))
    visitor.sees_answer(name, picture)
    visitor.sees_heat_map_of(visitor.app.answer(picture)[0][0].label)
    visitor.sees_no_problem()
    expect(visitor.page.locator("body")).to_match_aria_snapshot("""
        - heading "ConvMixer" [level=1]
        - figure:
          - img "bird"
        - slider "Heat map"
        - radiogroup "What the heat map shows"
        - tabpanel:
          - region "Answer of convmixer_256_8_cifar10":
            - status:
              - paragraph: /The answer is bird .*%/
            - list:
              - listitem:
                - button /bird/ [pressed]
    """)


# A picture comes in.


def test_pictures_are_uploaded_pasted_dropped_and_chosen(visitor):
    visitor.button("As JSON").click()
    heic = io.BytesIO()
    pillow_heif.from_pillow(draw(3, 300, 200)).save(heic)
    row = encode(draw(7, 3000, 1))
    for name, data in (("späß & <b>图.png", png(1)), ("phone.HEIC", heic.getvalue()), ("one row.png", row)):
        visitor.upload(name, data)
        visitor.sees_answer(name, data)
        expect(visitor.find("#stage .picture")).to_be_in_viewport()
        about = rf"^It sees no more than these 32 × 32 pixels; {SHIPPED} answered in \d+ ms\.$"
        expect(visitor.find("#answer .about p")).to_have_text(re.compile(about))
        expect(visitor.find("#json")).to_contain_text(name)
        shown = json.loads(visitor.find("#json .json-holder").inner_text())
        expected = [vars(prediction) for prediction in visitor.app.answer(data)[0]]
        assert shown.pop("seconds") > 0 and (shown.pop("engine"), shown.pop("precision")) == ("kernel", "float32")
        assert shown == {"image": name, "model": SHIPPED, "predictions": expected}
    visitor.transfer("paste", "pasted.png", png(3))
    visitor.sees_answer("pasted.png", png(3))
    for number, place in enumerate(("#title h1", "#stage .picture", "#source button", "#answer .bar")):
        visitor.transfer("drop", f"dropped {number}.png", png(4 + number), onto=place)
        visitor.sees_answer(f"dropped {number}.png", png(4 + number))
    for name, picture in reversed(visitor.app.examples.items()):
        visitor.button(f"Example: {name}").click()
        visitor.sees_answer(name, picture)


JPEG = encode(draw(5, 400, 300), "JPEG")
BAD = {
    "Empty.png": (b"", "empty"),
    "Cut.jpg": (JPEG[: len(JPEG) // 2], "damaged or cut short"),
    "Bomb.png": (png_bomb(20_000), "20000 x 20000 pixels"),
    "<img src=x onerror=alert(1)> ${1+1} {{x}} 图.png": (b"x", "cannot be read as a picture"),
}


def test_a_file_that_is_no_picture_is_named_with_the_reason(visitor, tmp_path):
    for name, (data, reason) in BAD.items():
        visitor.upload(name, data)
        visitor.sees_problem(name, reason)
    visitor.expected_troubles.append('Error   × File(s) exceed the maximum allowed size of 20.0 Mb: "Huge.png"')
    (tmp_path / "Huge.png").write_bytes(bytes(20 * 2**20 + 1))
    visitor.give('#source input[type="file"]', tmp_path / "Huge.png")
    expect(visitor.page.get_by_text("Huge.png")).to_be_visible()
    visitor.upload("good.png", png(1))
    visitor.sees_answer("good.png", png(1))
    visitor.sees_no_problem()


def test_a_page_whose_picture_is_gone_says_so_and_keeps_it_in_view(visitor):
    visitor.upload("mine.png", png(1))
    visitor.sees_answer("mine.png", png(1))
    for path in visitor.app.uploads.rglob("mine.png"):  # as by a restart
        path.unlink()
    visitor.choose(SECOND)
    visitor.sees_problem("Your picture is no longer here", "restarted; add it again")
    visitor.sees_picture("mine.png")
    visitor.upload("again.png", png(2))
    visitor.sees_answer("again.png", png(2), SECOND)


# Its heat maps.


def test_heat_maps_are_chosen_and_how_they_are_shown_lasts(visitor):
    first, _, third, *_ = (each.label for each in visitor.app.answer(visitor.app.examples["bird"])[0])
    visitor.bar(third).click()
    visitor.sees_heat_map_of(third)
    answers = "performance.getEntriesByType('resource').filter(each => each.name.includes('/queue/data')).length"
    before = visitor.page.evaluate(answers)
    visitor.picker().focus()  # who only looks at the models keeps it
    visitor.picker().blur()
    visitor.page.wait_for_function(f"{answers} > {before}")
    visitor.sees_heat_map_of(third)
    visitor.bar(third).click()
    expect(visitor.layer()).to_have_count(0)
    expect(visitor.find("#stage .picture")).to_have_css("filter", "none")
    visitor.bar(first).click()
    visitor.sees_heat_map_of(first)
    visitor.page.get_by_label("Heat map", exact=True).fill("35")
    expect(visitor.layer()).to_have_css("opacity", "0.35")
    assert visitor.find(".legend").inner_text().split() == ["none", "strongest"]
    visitor.page.get_by_text("For and against").click()
    assert visitor.find(".legend").inner_text().split() == ["against", "strongest", "for"]
    visitor.sees_heat_map_of("bird", signed=True)
    visitor.upload("next.png", png(1))
    visitor.sees_answer("next.png", png(1))
    visitor.sees_heat_map_of(visitor.app.answer(png(1))[0][0].label, signed=True)
    expect(visitor.layer()).to_have_css("opacity", "0.35")


def test_without_a_mouse(visitor):
    keyboard, passed = visitor.page.keyboard, []
    while passed.count("bar") < 2 and len(passed) < 60:
        keyboard.press("Tab")
        passed.append(visitor.page.evaluate("document.activeElement.id || document.activeElement.className"))
        focused = visitor.page.locator(":focus")
        if passed[-1] == "opacity":
            keyboard.press("ArrowLeft")
        elif focused.get_attribute("name") == "kind":
            keyboard.press("ArrowRight")
            visitor.sees_heat_map_of("bird", signed=True)
    assert passed.count("bar") == 2, passed
    expect(visitor.layer()).to_have_css("opacity", "0.79")
    assert "3px" in focused.evaluate("element => getComputedStyle(element).outline")
    keyboard.press("Enter")
    visitor.sees_heat_map_of(focused.locator(".label").inner_text(), signed=True)
    visitor.picker().focus()
    for key in ("ArrowDown", "Enter"):
        keyboard.press(key)
    visitor.sees_answer("bird", visitor.app.examples["bird"], SECOND)


# The address, and what is sent on.


def sees_address(visitor, query: str) -> None:
    expect(visitor.page).to_have_url(re.compile(re.escape(f"{visitor.app.client.url}/{query}") + "$"))


def test_the_address_keeps_what_is_shown_over_reload_back_and_forward(visitor):
    sees_address(visitor, "")
    ship = visitor.app.examples["ship"]
    visitor.button("Example: ship").click()
    sees_address(visitor, "?picture=ship")
    visitor.choose(SECOND)
    sees_address(visitor, f"?picture=ship&model={SECOND}")
    third = visitor.app.answer(ship, SECOND)[0][2].label
    visitor.bar(third).click()
    query = f"?picture=ship&model={SECOND}&class={third.replace(' ', '+')}"
    sees_address(visitor, query)
    visitor.page.reload()
    visitor.sees_answer("ship", ship, SECOND)
    visitor.sees_heat_map_of(third)
    visitor.turn_to("Batch")
    sees_address(visitor, f"{query}&tab=Batch")
    visitor.page.go_back()
    expect(visitor.find('html[data-tab="Answer"]')).to_be_attached()
    visitor.page.go_back()
    visitor.sees_answer("ship", ship)
    visitor.page.go_forward()
    visitor.sees_answer("ship", ship, SECOND)
    visitor.upload("mine.png", png(1))
    visitor.sees_answer("mine.png", png(1), SECOND)
    sees_address(visitor, f"?model={SECOND}")  # nobody else has got the picture
    visitor.page.reload()
    visitor.sees_problem("mine.png went with the reload; choose it again")
    visitor.button("Example: ship").click()
    visitor.sees_answer("ship", ship, SECOND)
    visitor.sees_no_problem()


def test_an_address_that_names_nothing_opens_the_page(visitor):
    for query in ("?model=nonsense&tab=No", "?picture=%3Cimg%20src=x%3E&class=x"):
        visitor.page.goto(f"{visitor.app.client.url}/{query}")
        visitor.sees_answer("bird", visitor.app.examples["bird"])


def test_an_answer_is_saved_as_a_card(visitor):
    with visitor.page.expect_download() as download:
        visitor.button("Save this answer").click()
    assert download.value.suggested_filename == "convmixer-bird.png"
    card = Image.open(download.value.path())
    pixels = np.asarray(card.convert("RGB"))
    assert card.size == (1200, 630)
    assert pixels[30:600, 30:600].std() > 20 and pixels[60:140, 640:900].min() < 80  # the picture, the best label
    assert (pixels[148:162, 640:1100] == (0xD9, 0x48, 0x0F)).all()  # its bar
