"""The page in a real browser: other models, two side by side, their insides, and many pictures at once."""

import csv
import re
import threading
from dataclasses import replace

import demo_browser
import hub_server
import numpy as np
from demo_browser import decoded, expect
from demo_client import SECOND, SHIPPED, draw, encode, png, write_checkpoint
from file_server import Resource

from convmixer import load_checkpoint, zoo
from convmixer.labels import imagenet_labels

served, browser, visitors, visitor = demo_browser.FIXTURES

HOSTILE = (
    "<img src=x onerror=\"window.troubles.push('run')\">",
    "<script>window.troubles.push('run')</script>",
    "${window.troubles.push('run')} {{window.troubles.push('run')}}",
    "\" onfocus='window.troubles.push(1)' autofocus tabindex=\"0",
)


def test_two_models_are_compared_side_by_side(visitor):
    bird = visitor.app.examples["bird"]
    expect(visitor.picker()).to_have_value(f"{SHIPPED} · 10 classes, 94.4 % right")
    visitor.choose(SECOND)
    expect(visitor.picker()).to_have_value(f"{SECOND} · 7 classes")
    visitor.sees_answer("bird", bird, SECOND)
    visitor.turn_to("Compare")
    for view, model in (("a", SHIPPED), ("b", SECOND)):
        visitor.sees_answer("bird", bird, model, view)
        visitor.sees_heat_map_of(visitor.app.answer(bird, model)[0][0].label, view=view)
    third = visitor.app.answer(bird)[0][2].label
    visitor.bar(third, view="a").click()
    visitor.sees_heat_map_of(third, view="a")
    visitor.choose(SHIPPED, "Model B")  # twice the same: others are offered
    expect(visitor.find("#agreement p, #side-b .bar")).to_have_count(0)
    visitor.button(SECOND, exact=True).click()
    visitor.sees_answer("bird", bird, SECOND, view="b")
    expect(visitor.find("#agreement p")).to_have_text(re.compile("^They differ: .*%"))
    visitor.upload("next.png", png(1))
    for view, model in (("a", SHIPPED), ("b", SECOND), ("main", SECOND)):
        visitor.sees_answer("next.png", png(1), model, view)
    picture = visitor.find("#stage .picture").get_attribute("src")
    assert [each.get_attribute("src") for each in visitor.find("#compare .picture").all()] == [picture, picture]


def test_ones_own_checkpoints_answer_and_their_texts_are_only_texts(visitors, tmp_path):
    visitor, stranger = visitors(), visitors()
    bird = visitor.app.examples["bird"]
    own = {"yours: <b>mine</b> ${1+1}": 2, "yours: <b>mine</b> ${1+1} (2)": 3}
    visitor.button("More models").click()
    visitor.upload_checkpoint("Text.safetensors", b"I am not a checkpoint. " * 9)
    visitor.sees_problem("Text.safetensors", "is not a checkpoint")
    assert str(visitor.app.uploads) not in visitor.page.get_by_role("alert").inner_text()
    visitor.sees_answer("bird", bird)
    for name, seed in own.items():
        own[name] = write_checkpoint(tmp_path / f"{seed}.pt", "<b>mine</b> ${1+1}", HOSTILE, seed=seed)
        visitor.upload_checkpoint("mine.safetensors", own[name].read_bytes())
        visitor.sees_answer("bird", bird, name, path=own[name])
        expect(visitor.picker()).to_have_value(name)
    for label in HOSTILE:
        visitor.bar(label).click()
        visitor.sees_heat_map_of(label)
    visitor.turn_to("Compare")
    visitor.sees_answer("bird", bird, SHIPPED, view="a")
    visitor.sees_answer("bird", bird, name, "b", own[name])
    visitor.turn_to("Look inside")
    visitor.turn_to("Batch")
    visitor.give("#files input", {f"{HOSTILE[0]}.png".replace("/", ""): png(2), "bad.png": b"bad"})
    expect(visitor.find("#batch tbody tr")).to_have_count(2)
    run = '#batch img:not([alt=""]), #batch script, [onerror], [onfocus], .bar b, img[src="x"]'
    assert visitor.find(run).count() == 0
    stranger.page.reload()
    stranger.picker().click()
    expect(stranger.page.get_by_role("option")).to_have_count(2)


def test_a_missing_model_is_fetched_with_progress_and_then_answers(served, visitors, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "tiny.safetensors", "tiny", imagenet_labels(), dim=512, depth=1)
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    with hub_server.HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path / "home")
        config, release = load_checkpoint(path).config, server.url("/tiny.pth.tar")
        entry = replace(zoo.MODELS["convmixer_768_32"], name="tiny", config=config, repo="ada/tiny", release=release)
        monkeypatch.setitem(zoo.MODELS, "tiny", entry)
        visitor = visitors()
        offer = visitor.button(re.compile("^Ask a model that knows 1,000 things.*tiny, a download"))
        server.resources["/tiny.pth.tar"] = Resource(b"I am not a checkpoint. " * 9)
        visitor.button("More models").click()
        download = visitor.button(re.compile("^Download .* for tiny$"))
        download.click()
        visitor.sees_problem("Could not download tiny", "is not a checkpoint")
        assert str(tmp_path) not in visitor.page.get_by_role("alert").inner_text()
        resource = server.add("ada/tiny", model=path.read_bytes())["model"]
        resource.pause = threading.Event()
        offer.click()
        expect(visitor.find("#offer")).to_contain_text(re.compile(r"tiny: \d+ of \d+ MB"))
        visitor.upload("meanwhile.png", png(1))
        visitor.sees_answer("meanwhile.png", png(1))
        resource.pause.set()
        expect(visitor.picker()).to_have_value(re.compile("^tiny · 1,000 classes"))
        visitor.sees_answer("meanwhile.png", png(1), "tiny")
        expect(visitor.find("#answer")).to_contain_text("This model knows 1,000 things, from tench to ")
        for gone in (offer, download):
            expect(gone).to_have_count(0)
    served.models._loaded.pop("tiny")


# Look inside.


def test_the_inside_of_the_network_follows_view_block_picture_and_model(visitor):
    visitor.turn_to("Look inside")
    caption, tiles, shown = visitor.find("#looked figcaption"), visitor.find("#looked .blocks img"), []

    def sees(pattern: str) -> None:
        """Pictures, none of them blank or shown before, and what they are."""
        expect(caption).to_have_text(re.compile(pattern))
        expect(visitor.find('[data-testid="status-tracker"]:not(.hide)')).to_have_count(0)
        shown.append([each.get_attribute("src") for each in visitor.find("#looked img").all()])
        assert all(np.asarray(decoded(url).convert("RGB")).std() > 3 for url in shown[-1])
        assert shown.index(shown[-1]) == len(shown) - 1

    sees("^The 16 channels that have most to say about this picture after block 8, ")
    expect(tiles).to_have_count(9)
    slider, block = visitor.page.get_by_role("slider", name="Block"), visitor.button("block 7", exact=True)
    block.press("Enter")
    sees("after block 7,")
    expect(block).to_be_focused()
    visitor.upload("next.png", png(1))
    expect(tiles.last).not_to_have_attribute("src", shown[-1][-2])
    sees("after block 7,")
    visitor.page.get_by_role("radio", name="Depthwise filters").check()
    sees("^In block 7 each of 256 channels .* of 5 × 5 patches: ")
    slider.focus()
    visitor.page.keyboard.press("ArrowLeft")
    sees("In block 6 ")
    visitor.page.get_by_role("radio", name="Patch filters").check()
    sees("patches of 2 × 2 pixels and compares each with these 256 filters.$")
    visitor.choose(SECOND)
    sees("these 16 filters.$")
    visitor.page.get_by_role("radio", name="Block by block").check()
    sees("after block 3,")
    expect(tiles).to_have_count(4)


def test_a_sheet_fills_the_window_and_a_place_is_marked_everywhere(visitor):
    visitor.turn_to("Look inside")
    sheet, size = visitor.find("#looked .sheet button"), visitor.page.viewport_size
    for close in (lambda: visitor.page.keyboard.press("Escape"), sheet.click):
        sheet.click()
        expect(sheet).to_have_attribute("aria-pressed", "true")
        assert sheet.bounding_box() == {"x": 0, "y": 0, **size}
        close()
        expect(sheet).to_have_attribute("aria-pressed", "false")
    maps = visitor.find("#stage .seen, .blocks .map").all()
    assert len(maps) == 10
    for pointed in (maps[0], maps[5]):
        box = pointed.bounding_box()
        visitor.page.mouse.move(box["x"] + 0.52 * box["width"], box["y"] + 0.3 * box["height"])
        for each in maps:
            left, top, width, map_width, map_height = each.evaluate("""element => {
                const mark = getComputedStyle(element, "::after"), box = element.getBoundingClientRect();
                return [...["left", "top", "width"].map(side => parseFloat(mark[side])), box.width, box.height];
            }""")
            marked = [left / map_width, top / map_height, width / map_width]
            assert np.allclose(marked, [8 / 16, 4 / 16, 1 / 16], atol=0.01)
    visitor.page.mouse.move(2, 2)
    expect(visitor.find("html.marking")).to_have_count(0)


# Many pictures.


def test_many_pictures_become_a_table_and_a_csv_file(visitor, tmp_path):
    good = {f"a_very_long_name_of-a.picture_{seed}.png": png(seed) for seed in range(16)} | {"inner/=1+1,.png": png(9)}
    files = good | {"broken_name.jpg": encode(draw(1, 300, 200), "JPEG")[:3000], "huge.jpg": bytes(20 * 2**20 + 1)}
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "mine" / name).write_bytes(data)
    visitor.choose(SECOND)
    visitor.turn_to("Batch")
    visitor.give('input[data-testid="Choose a folder-upload-button"]', tmp_path / "mine")
    rows, done = (
        visitor.find("#batch tbody tr"),
        rf"^17 of 19 pictures answered by {SECOND} in \d+\.\d s\. 2 could not be",
    )
    expect(visitor.find("#batch .note")).to_have_text(re.compile(done))
    expect(rows).to_have_count(19)
    expect(rows.filter(has_text="huge.jpg")).to_contain_text("it has 20 MB, and up to 20 MB fit; make it smaller")
    expect(rows.filter(has_text="broken_name.jpg")).to_contain_text("is damaged or cut short")
    with visitor.page.expect_download() as download:
        visitor.button("Download as CSV").click()
    assert download.value.suggested_filename == "convmixer.csv"
    table = list(csv.DictReader(download.value.path().read_text(encoding="utf-8-sig").splitlines()))
    assert {row["picture"] for row in table} == {f"mine/{name}" for name in files}
    for row in table:
        if data := good.get(row["picture"].removeprefix("mine/")):
            best, second, *_ = visitor.app.models.get(SECOND).classify(data)
            assert (row["answer"], row["second"], row["problem"]) == (best.label, second.label, "")
            assert np.allclose([float(row["score"]), float(row["second_score"])], [best.score, second.score], atol=1e-6)
    for width in (390, 1280):  # no word of the table is broken, and it is no wider than the screen
        visitor.page.set_viewport_size({"width": width, "height": 844})
        for cell in rows.locator("td").all():
            lines = "const of = document.createRange(); of.selectNodeContents(each); return of.getClientRects().length;"
            assert cell.evaluate(f"each => {{ {lines} }}") == 1
        assert visitor.width() == width


def test_many_pictures_are_sorted_opened_and_removed(visitor):
    files = {f"{seed}.png": png(seed) for seed in range(8)} | {"broken.png": b"broken"}
    visitor.turn_to("Batch")
    visitor.give("#files input", files)
    rows = visitor.find("#batch tbody tr")
    expect(rows).to_have_count(9)
    best = {name: visitor.app.answer(data)[0][0] for name, data in list(files.items())[:8]}
    for header, key in (("Answer", lambda name: best[name].label), ("Score", lambda name: -best[name].score)):
        visitor.find("#batch thead").get_by_role("button", name=header).first.click()
        names = rows.locator("button span").all_inner_texts()
        assert [key(name) for name in names] == sorted(map(key, names)) and len(names) == 8
    assert rows.last.locator("th").inner_text().startswith("broken.png")
    name = rows.locator("button span").nth(2).inner_text()
    rows.locator("button").nth(2).click()
    visitor.sees_answer(name, files[name])
    expect(visitor.find('html[data-tab="Answer"]')).to_be_attached()
    visitor.turn_to("Batch")
    visitor.find("#files").get_by_role("button", name=re.compile("Remove|Clear")).first.click()
    expect(rows).not_to_have_count(9)
