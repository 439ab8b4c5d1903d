"""The page in a real browser: what moves is answered at once, and a restarted server says so."""

import io

import demo_browser
import httpx
import pytest
from demo_browser import SECOND, draw, encode, expect, png
from PIL import Image

app, browser, visitors, visitor = demo_browser.FIXTURES


def answers(visitor) -> list[str]:
    return visitor.find("#answer .bar").all_inner_texts()


def wait_for_live_answers(visitor, count: int) -> None:
    visitor.page.evaluate("performance.clearResourceTimings()")  # of which there may be 250
    so_far = "performance.getEntriesByType('resource').filter(each => each.name.includes('/live?')).length"
    visitor.page.wait_for_function(f"{so_far} >= {count}")


def test_the_camera_answers_as_it_moves_and_a_frozen_frame_is_a_picture(visitors):
    visitor = visitors(permissions=["camera"])
    visitor.page.get_by_role("button", name="Use the camera").click()
    expect(visitor.find("#stage video")).to_be_visible()
    wait_for_live_answers(visitor, 5)
    before = visitor.find("#stage .stage").get_attribute("data-heat")
    wait_for_live_answers(visitor, 20)
    assert visitor.find("#stage .stage").get_attribute("data-heat") != before  # the browser's camera shows a clock
    visitor.choose(SECOND)
    expect(visitor.find("#answer .bar .label").first).to_contain_text(SECOND)
    wait_for_live_answers(visitor, 3)
    expect(visitor.find("#answer .bar .label").first).to_contain_text(SECOND)
    visitor.page.get_by_role("button", name="Freeze").click()
    visitor.sees_picture("camera.jpg")
    expect(visitor.find("#stage video")).to_have_count(0)
    shot = demo_browser.decoded(visitor.find("#stage .picture").get_attribute("src"))
    assert min(shot.size) > 200
    visitor.page.get_by_role("button", name="Use the camera").click()
    wait_for_live_answers(visitor, 2)
    visitor.paste("after.png", png(8))  # whatever comes in ends it
    visitor.sees_answer("after.png", png(8), SECOND)
    expect(visitor.page.get_by_role("button", name="Use the camera")).to_be_visible()


@pytest.mark.parametrize("size", [(60, 40), (300, 500)])
def test_what_is_covered_counts_no_more_until_it_is_bare_again(visitor, size):
    data = encode(draw(1, *size))
    visitor.upload("mine.png", data)
    visitor.sees_answer("mine.png", data)
    bare = answers(visitor)
    visitor.page.get_by_role("button", name="Cover a part").click()
    box, mouse = visitor.find("#stage .frame").bounding_box(), visitor.page.mouse
    mouse.move(box["x"] + 5, box["y"] + 5)
    mouse.down()
    for row in range(6):
        for column in (0.02, 0.98):
            mouse.move(box["x"] + column * box["width"], box["y"] + (row + 0.5) / 6 * box["height"], steps=20)
    mouse.up()
    grey = visitor.app.answer(Image.new("RGB", (60, 40), "#808080"))[0][0].label
    if size == (60, 40):  # the brush covers all of it
        expect(visitor.find("#answer .best")).to_contain_text(grey)
    expect(visitor.find("#answer .bar").first).not_to_have_text(bare[0].replace("\n", " "))
    visitor.page.get_by_role("button", name="Cover a part").click()
    assert answers(visitor) == bare
    visitor.sees_answer("mine.png", data)


PLACES = {
    "insecure": "only over HTTPS or on the machine that runs it",
    "NotFoundError": "finds no camera on this device",
}


@pytest.mark.parametrize("why", [*PLACES, "NotAllowedError"])
def test_where_there_is_no_camera_the_page_says_why_beside_the_button(visitors, why):
    visitor = visitors(viewport={"width": 640, "height": 400})  # a laptop at 200 %
    if why == "insecure":  # as at a host name that is not localhost, where a browser has no such object
        visitor.page.evaluate("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
    else:
        error = f"async () => {{ throw new DOMException('', '{why}'); }}"
        visitor.page.evaluate(f"() => {{ navigator.mediaDevices.getUserMedia = {error}; }}")
    visitor.page.get_by_role("button", name="Use the camera").click()
    visitor.sees_problem(PLACES.get(why, "does not let this page use the camera"))
    expect(visitor.page.get_by_role("alert")).to_be_in_viewport()


@pytest.mark.parametrize(
    ("model", "frame", "words"),
    [("auto", b"", "is empty"), ("nonsense", png(1), "is not on this machine"), ("auto", bytes(600_000), "too large")],
)
def test_a_frame_that_cannot_be_answered_is_one_sentence(app, model, frame, words):
    answer = httpx.post(f"{app.url}live", params={"model": model}, content=frame, trust_env=False).json()
    assert words in answer["problem"] and answer.keys() == {"problem"}


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


def test_heic_is_answered(visitor):
    pillow_heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    pillow_heif.from_pillow(draw(3, 300, 200)).save(stream)
    visitor.upload("phone.HEIC", stream.getvalue())
    visitor.sees_answer("phone.HEIC", stream.getvalue())
