"""The page in a real browser: its address, the card of an answer, and what a link to it looks like elsewhere."""

import re

import demo_browser
import httpx
import numpy as np
import pytest
from demo_browser import SECOND, expect, png
from PIL import Image

app, browser, visitors, visitor = demo_browser.FIXTURES


def sees_address(visitor, query: str) -> None:
    expect(visitor.page).to_have_url(re.compile(re.escape(visitor.app.url + query) + "$"))


def test_the_address_keeps_what_is_shown_over_reload_back_and_forward(visitor):
    sees_address(visitor, "")
    ship = visitor.app.examples["ship"]
    visitor.page.get_by_role("button", name="Example: ship").click()
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
    expect(visitor.page.get_by_role("combobox", name="Model", exact=True)).to_have_value(re.compile(f"^{SECOND} "))
    sees_address(visitor, query)
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
    visitor.page.get_by_role("button", name="Example: ship").click()
    visitor.sees_answer("ship", ship, SECOND)
    visitor.sees_no_problem()
    visitor.page.reload()
    visitor.sees_answer("ship", ship, SECOND)
    visitor.sees_no_problem()


@pytest.mark.parametrize("query", ["?picture=unicorn", "?model=nonsense&tab=No", "?picture=%3Cimg%20src=x%3E&class=x"])
def test_an_address_that_names_nothing_opens_the_page(visitor, query):
    visitor.page.goto(visitor.app.url + query)
    visitor.sees_answer("bird", visitor.app.examples["bird"])


def test_an_answer_is_saved_as_a_card(visitor):
    with visitor.page.expect_download() as download:
        visitor.page.get_by_role("button", name="Save this answer").click()
    assert download.value.suggested_filename == "convmixer-bird.png"
    card = Image.open(download.value.path())
    pixels = np.asarray(card.convert("RGB"))
    assert card.size == (1200, 630)
    assert pixels[30:600, 30:600].std() > 20 and pixels[60:140, 640:900].min() < 80  # the picture, the best label
    assert (pixels[148:162, 640:1100] == (0xD9, 0x48, 0x0F)).all()  # its bar


def test_a_link_shows_this_page_and_not_gradios(app):
    html = httpx.get(app.url, trust_env=False).text
    head = dict(re.findall(r'<meta (?:property|name)="([a-z:]+)" content="([^"]*)"', html))
    assert head["og:title"].startswith("ConvMixer") and head["twitter:card"] == "summary_large_image"
    assert "gradio" not in "".join(re.findall('<meta (?:property|name)="(?:og|twitter)[^>]*>', html)).lower()
    assert httpx.get(head["og:image"], trust_env=False).headers["content-type"] == "image/jpeg"
    assert head["og:image"] == f"{app.url}preview.jpg"
    assert httpx.get(f"{app.url}favicon.ico", trust_env=False).text.startswith("<svg")
    assert httpx.head(app.url, trust_env=False).status_code == 200
