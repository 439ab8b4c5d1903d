"""The page in a real browser: other models, their insides, and many pictures at once."""

import pickle
import re
import threading
from dataclasses import replace

import demo_browser
import hub_server
import numpy as np
import pytest
from demo_browser import SECOND, SHIPPED, draw, encode, expect, png, write_checkpoint
from file_server import Resource

from convmixer import load_checkpoint, zoo
from convmixer.labels import imagenet_labels

app, browser, visitors, visitor = demo_browser.FIXTURES

HOSTILE = (
    "<img src=x onerror=\"window.troubles.push('run')\">",
    "<script>window.troubles.push('run')</script>",
    "${window.troubles.push('run')}",
    "{{window.troubles.push('run')}}",
    "\" onfocus='window.troubles.push(1)' autofocus tabindex=\"0",
)


# Models.


def test_another_model_answers_and_keeps_answering(visitor):
    picker = visitor.page.get_by_role("combobox", name="Model", exact=True)
    expect(picker).to_have_value(f"{SHIPPED} · 10 classes, 94.4 % right")
    visitor.choose(SECOND)
    expect(picker).to_have_value(f"{SECOND} · 7 classes")
    visitor.sees_answer("bird", visitor.app.examples["bird"], SECOND)
    visitor.upload("next.png", png(1))
    visitor.sees_answer("next.png", png(1), SECOND)
    visitor.choose(SHIPPED)
    visitor.sees_answer("next.png", png(1))


def test_who_only_looks_at_the_picker_keeps_the_heat_map(visitor):
    third = visitor.app.answer(visitor.app.examples["bird"])[0][2].label
    visitor.bar(third).click()
    picker = visitor.page.get_by_role("combobox", name="Model", exact=True)
    with visitor.waits_for_the_server():
        picker.focus()
        picker.blur()
    visitor.sees_heat_map_of(third)


def test_two_models_are_compared_side_by_side(visitor):
    bird = visitor.app.examples["bird"]
    visitor.turn_to("Compare")
    visitor.sees_answer("bird", bird, SHIPPED, view="a")
    visitor.sees_answer("bird", bird, SECOND, view="b")
    expect(visitor.layer("main")).to_have_count(0)
    visitor.sees_heat_map_of("bird", view="a")
    other = visitor.app.answer(bird, SECOND)[0][0].label
    visitor.sees_heat_map_of(other, view="b")
    picture = visitor.find("#stage .picture").get_attribute("src")
    assert [each.get_attribute("src") for each in visitor.find("#compare .picture").all()] == [picture, picture]
    predictions, _ = visitor.app.answer(bird)
    visitor.bar(predictions[2].label, view="a").click()
    visitor.sees_heat_map_of(predictions[2].label, view="a")
    visitor.sees_heat_map_of(other, view="b")
    visitor.choose(SECOND, "Model A")
    visitor.sees_answer("bird", bird, SECOND, view="a")
    visitor.choose(SHIPPED, "Model B")
    visitor.sees_answer("bird", bird, SHIPPED, view="b")
    visitor.upload("next.png", png(1))
    visitor.sees_answer("next.png", png(1), SECOND, view="a")
    visitor.sees_answer("next.png", png(1), SHIPPED, view="b")
    visitor.turn_to("Answer")
    visitor.sees_answer("next.png", png(1))


def test_compare_says_where_two_models_agree(visitors, tmp_path):
    visitor = visitors()
    path = write_checkpoint(tmp_path / "mine.safetensors", "mine", visitor.app.models.get(SHIPPED).labels, seed=5)
    visitor.unfold("More models")
    visitor.upload_checkpoint("mine.safetensors", path.read_bytes())
    expect(visitor.page.get_by_role("combobox", name="Model", exact=True)).to_have_value("yours: mine")
    visitor.turn_to("Compare")
    expect(visitor.find("#agreement p")).to_have_text(re.compile("^(Both say|They differ: ).*%"))
    visitor.choose(SHIPPED, "Model B")
    expect(visitor.find("#agreement p")).to_have_count(0)
    expect(visitor.find("#side-b .bar")).to_have_count(0)
    visitor.page.get_by_role("button", name=SECOND, exact=True).click()
    visitor.sees_answer("bird", visitor.app.examples["bird"], SECOND, view="b")


def test_ones_own_checkpoint_answers_and_its_texts_are_only_texts(visitors, tmp_path):
    visitor, name = visitors(), "<b>mine</b> ${1+1}"
    path = write_checkpoint(tmp_path / "mine.safetensors", name, HOSTILE, seed=2)
    visitor.unfold("More models")
    visitor.upload_checkpoint("mine.safetensors", path.read_bytes())
    own = f"yours: {name}"
    visitor.sees_own_answer("bird", visitor.app.examples["bird"], path, own)
    expect(visitor.page.get_by_role("combobox", name="Model", exact=True)).to_have_value(own)
    for label in HOSTILE:
        visitor.bar(label).click()
        visitor.sees_heat_map_of(label)
    visitor.upload("next.png", png(1))
    visitor.sees_own_answer("next.png", png(1), path, own)
    visitor.turn_to("Compare")
    visitor.sees_answer("next.png", png(1), SHIPPED, view="a")
    visitor.sees_own_answer("next.png", png(1), path, own, view="b")
    visitor.turn_to("Look inside")
    visitor.waits_for_the_tab("Look inside")
    visitor.turn_to("Batch")
    visitor.give("#files input", {f"{HOSTILE[0]}.png".replace("/", ""): png(2), "bad.png": b"bad"})
    expect(visitor.find("#batch tbody tr")).to_have_count(2)
    assert (
        visitor.find('#batch img:not([alt=""]), #batch script, [onerror], [onfocus], .bar b, img[src="x"]').count() == 0
    )
    stranger = visitors()
    stranger.page.get_by_role("combobox", name="Model", exact=True).click()
    expect(stranger.page.get_by_role("option")).to_have_count(2)


def test_two_own_checkpoints_are_compared(visitor, tmp_path):
    paths = [write_checkpoint(tmp_path / f"{seed}.safetensors", "mine", seed=seed) for seed in (3, 4)]
    visitor.unfold("More models")
    for name, path in zip(("yours: mine", "yours: mine (2)"), paths, strict=True):
        visitor.upload_checkpoint("mine.safetensors", path.read_bytes())
        visitor.sees_own_answer("bird", visitor.app.examples["bird"], path, name)
    visitor.turn_to("Compare")
    visitor.choose("yours: mine", "Model A")
    for side, name, path in (("a", "yours: mine", paths[0]), ("b", "yours: mine (2)", paths[1])):
        visitor.sees_own_answer("bird", visitor.app.examples["bird"], path, name, view=side)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_cannot_be_used_is_named_with_the_reason(visitor, tmp_path):
    trap, costly = tmp_path / "sprung", write_checkpoint(tmp_path / "costly", size=4096, patch_size=1, dim=4, depth=1)
    bad = {
        "Empty.safetensors": (b"", ""),
        "Text.safetensors": (b"I am not a checkpoint. " * 9, ""),
        "Trap.pth": (pickle.dumps(Trap(trap)), ""),
        "Costly.safetensors": (costly.read_bytes(), "needs too much arithmetic for a web page"),
    }
    visitor.unfold("More models")
    for name, (data, reason) in bad.items():
        visitor.upload_checkpoint(name, data)
        visitor.sees_problem(name, reason)
        visitor.sees_answer("bird", visitor.app.examples["bird"])
    assert not trap.exists()
    visitor.upload("good.png", png(1))
    visitor.sees_answer("good.png", png(1))
    visitor.sees_no_problem()


def test_a_missing_model_is_fetched_with_progress_and_then_answers(app, visitors, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "tiny.safetensors", "tiny", imagenet_labels(), dim=512, depth=1)
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    with hub_server.HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path / "home")
        config, release = load_checkpoint(path).config, server.url("/tiny.pth.tar")
        entry = replace(zoo.MODELS["convmixer_768_32"], name="tiny", config=config, repo="ada/tiny", release=release)
        monkeypatch.setitem(zoo.MODELS, "tiny", entry)
        visitor = visitors()
        offer = visitor.page.get_by_role(
            "button", name=re.compile("^Ask a model that knows 1,000 things.*tiny, a download")
        )
        offer.click()
        visitor.sees_problem("Could not download tiny", "Not Found")
        visitor.sees_answer("bird", visitor.app.examples["bird"])
        server.resources["/tiny.pth.tar"] = Resource(b"I am not a checkpoint. " * 9)
        visitor.unfold("More models")
        visitor.page.get_by_role("button", name=re.compile("^Download .* for tiny$")).click()
        visitor.sees_problem("Could not download tiny", "is not a checkpoint")
        assert str(tmp_path) not in visitor.page.get_by_role("alert").inner_text()
        resource = server.add("ada/tiny", model=path.read_bytes())["model"]
        resource.pause = threading.Event()
        offer.click()
        expect(visitor.find("#offer")).to_contain_text(re.compile(r"tiny: \d+ of \d+ MB"))
        visitor.upload("meanwhile.png", png(1))
        visitor.sees_answer("meanwhile.png", png(1))
        resource.pause.set()
        expect(visitor.page.get_by_role("combobox", name="Model", exact=True)).to_have_value(
            re.compile("^tiny · 1,000 classes")
        )
        visitor.sees_answer("meanwhile.png", png(1), "tiny")
        expect(visitor.find("#answer")).to_contain_text("This model knows 1,000 things, from tench to ")
        expect(offer).to_have_count(0)
        visitor.sees_no_problem()
        expect(visitor.page.get_by_role("button", name=re.compile("^Download .* for tiny$"))).to_have_count(0)
    app.models._loaded.pop("tiny")


# Look inside.


def test_a_contact_sheet_fills_the_window_until_escape_or_the_next_press(visitor):
    visitor.turn_to("Look inside")
    sheet, size = visitor.find("#looked .sheet button"), visitor.page.viewport_size
    small = sheet.bounding_box()
    for close in (lambda: visitor.page.keyboard.press("Escape"), sheet.click):
        sheet.click()
        expect(sheet).to_have_attribute("aria-pressed", "true")
        assert sheet.bounding_box() == {"x": 0, "y": 0, "width": size["width"], "height": size["height"]}
        close()
        expect(sheet).to_have_attribute("aria-pressed", "false")
        assert sheet.bounding_box() == small


def test_the_inside_of_the_network_follows_view_block_picture_and_model(visitor):
    visitor.turn_to("Look inside")
    caption = visitor.find("#looked figcaption")
    tiles = visitor.find("#looked .blocks img")
    expect(tiles).to_have_count(9)
    expect(caption).to_have_text(
        re.compile("^The 16 channels that have most to say about this picture after block 8, ")
    )
    shown = [visitor.looks_inside()]
    slider = visitor.page.get_by_role("slider", name="Block")
    expect(slider).to_be_hidden()
    block = visitor.page.get_by_role("button", name="block 7", exact=True)
    block.press("Enter")
    expect(caption).to_contain_text("after block 7,")
    expect(block).to_have_attribute("aria-pressed", "true")
    expect(block).to_be_focused()
    shown.append(visitor.looks_inside())
    before = tiles.last.get_attribute("src")
    visitor.upload("next.png", png(1))
    expect(tiles.last).not_to_have_attribute("src", before)
    visitor.sees_picture("next.png")
    shown.append(visitor.looks_inside())
    visitor.page.get_by_role("radio", name="Depthwise filters").check()
    expect(caption).to_have_text(re.compile("^In block 7 each of 256 channels .* of 5 × 5 patches: "))
    shown.append(visitor.looks_inside())
    slider.focus()
    visitor.page.keyboard.press("ArrowLeft")
    expect(caption).to_contain_text("In block 6 ")
    visitor.page.get_by_role("radio", name="Patch filters").check()
    expect(caption).to_have_text(re.compile("patches of 2 × 2 pixels and compares each with these 256 filters.$"))
    expect(slider).to_be_hidden()
    shown.append(visitor.looks_inside())
    visitor.choose(SECOND)
    expect(caption).to_have_text(re.compile("these 16 filters.$"))
    shown.append(visitor.looks_inside())
    visitor.page.get_by_role("radio", name="Block by block").check()
    expect(tiles).to_have_count(4)
    expect(caption).to_have_text(re.compile("after block 3,"))
    shown.append(visitor.looks_inside())
    assert len(set(shown)) == len(shown)
    visitor.turn_to("Answer")
    visitor.sees_answer("next.png", png(1), SECOND)


def test_a_place_is_marked_in_the_picture_and_in_all_blocks(visitor):
    visitor.turn_to("Look inside")
    visitor.looks_inside()
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
            assert np.allclose(
                [left / map_width, top / map_height, width / map_width], [8 / 16, 4 / 16, 1 / 16], atol=0.01
            )
    visitor.page.mouse.move(2, 2)
    expect(visitor.find("html.marking")).to_have_count(0)


# Many pictures.


def test_many_pictures_become_a_table_and_a_csv_file(visitor, tmp_path, monkeypatch):
    files = {f"picture {number}.png": png(number) for number in range(19)}
    files = {"Broken.jpg": encode(draw(1, 300, 200), "JPEG")[:3000], '=1+1 späß, "quoted".png': png(30)} | files
    files["Huge.jpg"] = bytes(20 * 2**20 + 1)
    names, held = list(files), hold_at(5, monkeypatch)
    visitor.turn_to("Batch")
    visitor.give("#files input", files)
    expect(visitor.find("#batch")).to_contain_text(re.compile(r"\b5/22\b"))
    held.set()
    rows = visitor.find("#batch tbody tr")
    expect(rows).to_have_count(22)
    for row, name in zip(rows.all(), names, strict=True):
        expect(row.locator("th")).to_contain_text(name)
    expect(rows.last).to_contain_text("it has 20 MB, and up to 20 MB fit; make it smaller")
    expect(rows.first).to_contain_text("Broken.jpg is damaged or cut short")
    expect(visitor.find("#batch .note")).to_have_text(
        re.compile(rf"^20 of 22 pictures answered by {SHIPPED} in \d+\.\d s\. 2 could not be read\.$")
    )
    expected = visitor.app.models.get(SHIPPED).classify_many(list(files.values())[1:16], 2)
    table = visitor.downloads_csv()
    assert [row["picture"].lstrip("'") for row in table] == names
    assert table[0]["answer"] == "" and "damaged" in table[0]["problem"]
    for row, (best, second) in zip(table[1:16], expected, strict=True):
        assert [row["answer"], float(row["score"]), row["second"], float(row["second_score"]), row["problem"]] == [
            best.label,
            best.score,
            second.label,
            second.score,
            "",
        ]


def test_many_pictures_are_sorted_opened_and_removed(visitor):
    files = {f"{seed}.png": png(seed) for seed in range(8)} | {"broken_name.png": b"broken"}
    visitor.turn_to("Batch")
    visitor.give("#files input", files)
    rows = visitor.find("#batch tbody tr")
    expect(rows).to_have_count(9)
    best = {name: visitor.app.answer(data)[0][0] for name, data in list(files.items())[:8]}
    for header, key in (("Answer", lambda name: best[name].label), ("Score", lambda name: -best[name].score)):
        visitor.find("#batch thead").get_by_role("button", name=header).first.click()
        names = rows.locator("button span").all_inner_texts()
        assert [key(name) for name in names] == sorted(map(key, names)) and len(names) == 8
    assert rows.last.locator("th").inner_text().startswith("broken_name.png")
    assert min(demo_browser.decoded(rows.first.locator("img").get_attribute("src")).size) > 8
    name = rows.locator("button span").nth(2).inner_text()
    rows.locator("button").nth(2).click()
    visitor.sees_answer(name, files[name])
    expect(visitor.find('html[data-tab="Answer"]')).to_be_attached()
    visitor.turn_to("Batch")
    visitor.find("#files").get_by_role("button", name=re.compile("Remove|Clear")).first.click()
    expect(rows).not_to_have_count(9)


@pytest.mark.parametrize("width", [390, 1280])
def test_no_word_of_the_table_is_broken_and_it_is_no_wider_than_the_screen(visitors, width):
    visitor = visitors(viewport={"width": width, "height": 844})
    visitor.turn_to("Batch")
    visitor.give("#files input", {"a_very_long_name_of-a.picture_that-somebody_has_taken.png": png(1)})
    cells = visitor.find("#batch tbody td")
    expect(cells).to_have_count(4)
    for cell in cells.all():
        lines = "const of = document.createRange(); of.selectNodeContents(each); return of.getClientRects().length;"
        assert cell.evaluate(f"each => {{ {lines} }}") == 1
    assert visitor.page.evaluate("document.documentElement.scrollWidth") == width


def hold_at(number: int, monkeypatch) -> threading.Event:
    """The next batch stops after so many pictures, until the event is set."""
    from demo import many

    event, classify = threading.Event(), many.classify

    def held(*arguments):
        for position, row in enumerate(classify(*arguments)):
            if position == number:
                event.wait(20)
            yield row

    monkeypatch.setattr(many, "classify", held)
    return event


def test_a_folder_is_answered_by_the_chosen_model(visitor, tmp_path):
    (tmp_path / "inner").mkdir()
    files = {"a.png": png(1), "b.png": png(2), "inner/c.png": png(3), "notes.txt": b"no picture"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    visitor.choose(SECOND)
    visitor.turn_to("Batch")
    visitor.give('input[data-testid="Choose a folder-upload-button"]', tmp_path)
    expect(visitor.find("#batch tbody tr")).to_have_count(4)
    table = {row["picture"]: row for row in visitor.downloads_csv()}
    assert "cannot be read as a picture" in table.pop(f"{tmp_path.name}/notes.txt")["problem"]
    for name, data in list(files.items())[:3]:
        (best, _), row = visitor.app.answer(data, SECOND)[0][:2], table[f"{tmp_path.name}/{name}"]
        assert row["answer"] == best.label and float(row["score"]) == pytest.approx(best.score, abs=1e-6)
