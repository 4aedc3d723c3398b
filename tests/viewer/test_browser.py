"""The viewer in a real browser: Debian's Chromium, driven by Playwright. Skipped where one of them is not installed."""

import csv
import io
import json
import math
import re
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from urllib.parse import quote

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from dino import api
from dino.config.load import load_config
from dino.config.schema import WordsConfig
from dino.extraction.catalogue import read_catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.viewer.pixels import TILE_PX
from tests.tiny_models import save_checkpoint
from tests.viewer.conftest import DIM, HOSTILE, write_features, write_grids, write_maps

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKEN = "a-token-of-the-tests"
STEP = 64  # side of a tile, level-0 px
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")


@pytest.fixture(scope="module")
def address(painted, features, tmp_path_factory):
    """A running viewer of the painted slides, with two encoders."""
    from dino.models.weights import load_backbone_file
    from dino.viewer.attention import AttentionFiles
    from dino.viewer.models import TileAttention
    from dino.viewer.pixels import SlidePixels
    from dino.viewer.server import Viewer

    write_features(painted, "second", seed=1)
    catalogue = read_catalogue(painted)
    encoders = {name: EncoderFeatures(catalogue, name, 4) for name in ("random", "second")}
    folder = tmp_path_factory.mktemp("maps")
    write_maps(catalogue, folder)
    maps = {"random": AttentionFiles(catalogue, folder)}
    model = TileAttention(catalogue, load_backbone_file(save_checkpoint(folder / "model.pt")))
    pixels = SlidePixels(catalogue.slides)
    viewer = Viewer(catalogue, encoders, pixels, attention=maps, models={"random": model})
    with _served(viewer) as shown:
        yield shown
    shutil.rmtree(painted / "features_second")  # the ROOT is that of other tests too


@contextmanager
def _served(viewer):
    """Serve until the end of the block; yields the address with the token."""
    from dino.viewer.guard import LOCAL_HOSTS, Guard
    from dino.viewer.server import build_app

    app = Guard(build_app(viewer), TOKEN, LOCAL_HOSTS, viewer.writable)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token={TOKEN}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def words_root(painted, features, tmp_path_factory):
    """A ROOT of its own, with words and grids of the encoder "random"."""
    root = shutil.copytree(painted, tmp_path_factory.mktemp("words") / "root")
    shutil.rmtree(root / "features_second", ignore_errors=True)  # while the other fixture is in use
    api.find_words("random", root, load_config(WordsConfig, overrides={"count": 4}))
    write_grids(root, "random")
    return root


@pytest.fixture(scope="module")
def writable_address(words_root):
    """A running viewer of it, which may save names, with models of both levels."""
    from dino.models.weights import load_backbone_file
    from dino.viewer.models import RegionAttention, TileAttention
    from dino.viewer.pixels import SlidePixels
    from dino.viewer.server import Viewer

    catalogue, folder = read_catalogue(words_root), words_root.parent
    tile = TileAttention(catalogue, load_backbone_file(save_checkpoint(folder / "model.pt")))
    level_2 = load_backbone_file(save_checkpoint(folder / "region.pt", "region", DIM))
    region = RegionAttention(catalogue, level_2, words_root / "region_4096_pretraining_random")
    encoders = {"random": EncoderFeatures(catalogue, "random")}
    pixels, models = SlidePixels(catalogue.slides), {"models": {"random": tile}, "regions": {"random": region}}
    with _served(Viewer(catalogue, encoders, pixels, True, **models)) as shown:
        yield shown


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # A container's root has no sandbox; the page is our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page on which errors of scripts and of the content security policy fail the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
    yield page
    page.close()
    assert problems == []


def _open(page, address, state="", overlay="clusters"):
    page.goto(f"{address}#{state}")
    page.wait_for_selector("body[data-ready='1']", timeout=60_000)
    page.wait_for_selector(f"body[data-overlay-ready='{overlay}']", timeout=60_000)


def test_open_zoom_and_find_slides(page, address):
    _open(page, address)
    assert page.locator("#slides button").count() == 3
    assert HOSTILE in page.locator("#slides .name").all_inner_texts()  # as text
    assert page.locator("#slides .name img").count() == 0
    assert "token" not in page.url
    page.fill("#filter", "two")
    assert page.locator("#slides .name").all_inner_texts() == ["two"]
    page.select_option("#filter-column", "patient_id")
    page.fill("#filter", "p2")
    assert page.locator("#slides .name").all_inner_texts() == [HOSTILE]
    page.locator("#slides button").click()
    page.wait_for_function("() => location.hash.includes('slide=')")
    before = page.locator("#scale").inner_text()
    page.click("#zoom-in")
    page.click("#zoom-in")
    page.wait_for_function("text => document.querySelector('#scale').innerText !== text", arg=before)


def test_switch_overlays(page, address):
    _open(page, address, "slide=one")
    assert page.locator("#legend .class").count() == 4
    for overlay, legend in (("colours", "principal"), ("tissue", "100 %"), ("similarity", "Click a tile")):
        page.click(f"[data-overlay={overlay}]")
        page.wait_for_selector(f"body[data-overlay-ready='{overlay}']")
        assert legend in page.locator("#legend").inner_text()
        page.wait_for_function(f"() => location.hash.includes('overlay={overlay}')")


def _at(page, x, y):
    """The place on the page of a position of the slide, from the view in the address."""
    page.wait_for_function("() => location.hash.includes('view=')")
    page.wait_for_timeout(300)
    view = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('view')")
    centre_x, centre_y, zoom = map(float, view.split(","))
    box = page.locator("#zoom").bounding_box()
    return (
        box["x"] + box["width"] / 2 + (x - centre_x) * zoom,
        box["y"] + box["height"] / 2 + (y - centre_y) * zoom,
    )


def test_click_a_tile_and_visit_its_neighbour(page, address, catalogue, features):
    _open(page, address, "slide=one&view=320,320,1")
    x, y = (int(n) for n in catalogue.tiles["one"].coords[23])
    page.mouse.click(*_at(page, x + 40, y + 10))
    page.wait_for_selector("#neighbours button img")
    assert f"{x}, {y}" in page.locator("#tile-numbers").inner_text()
    unit = {slide: rows / np.linalg.norm(rows, axis=1, keepdims=True) for slide, rows in features.items()}
    best = float((unit[HOSTILE] @ unit["one"][23]).max())  # the only slide of another patient
    assert page.locator("#neighbours .number").first.inner_text() == f"{best:.2f}"
    page.wait_for_function("() => document.querySelector('#neighbours img').naturalWidth > 0")
    page.locator("#neighbours button").first.click()
    page.wait_for_function(
        "() => document.querySelector('#slides button[aria-current=true] .name').textContent.startsWith('<img')"
    )
    found = int((unit[HOSTILE] @ unit["one"][23]).argmax())
    there = tuple(int(n) for n in catalogue.tiles[HOSTILE].coords[found])
    page.wait_for_function(
        "text => document.querySelector('#tile-numbers').innerText.includes(text)", arg=f"{there[0]}, {there[1]}"
    )


def test_an_address_shows_the_same_to_a_colleague(page, address, browser):
    _open(page, address, "slide=two&overlay=similarity&tile=128%2C64&opacity=0.3", overlay="similarity")
    other = browser.new_page()
    page.wait_for_function("() => location.hash.includes('view=')")
    _open(other, address, page.url.partition("#")[2], overlay="similarity")
    assert other.locator("#tile-numbers").inner_text() == page.locator("#tile-numbers").inner_text()
    assert other.locator("#opacity").input_value() == "0.3"
    other.close()


def test_name_a_cluster_and_download_it(page, address):
    _open(page, address, "slide=one")
    page.locator("#legend .class").first.click()
    page.wait_for_selector("#legend .tiles img")
    page.fill("#legend input", "keratin")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#legend .class').innerText.includes('keratin')")
    with page.expect_download() as download:
        page.click("#export")
    collection = json.loads(download.value.path().read_text())
    names = {one["properties"]["classification"]["name"] for one in collection["features"]}
    assert "keratin" in names and "Cluster 1" not in names and "Cluster 2" in names


def _names(page):
    return [text.split("\n")[0] for text in page.locator("#legend .class").all_inner_texts()]


@pytest.fixture
def table(words_root):
    """The table of words, as it was again after the test."""
    table = words_root / "words_random" / "words.csv"
    before = table.read_bytes()
    yield table
    table.write_bytes(before)


def test_name_a_word_for_everyone(page, writable_address, words_root, table):
    """It is in the table, and at once in the legend, the numbers of the tile, the neighbours and the download."""
    before = table.read_bytes()
    catalogue = read_catalogue(words_root)
    x, y = catalogue.tiles["one"].coords[7].tolist()
    word = EncoderFeatures(catalogue, "random").word_of("one", 7)
    _open(page, writable_address, f"slide=one&tile={x}%2C{y}&only={word}&by=word")
    page.wait_for_selector("#neighbours button.other, #neighbours button.same")
    assert page.locator("#legend-title").inner_text() == "Words"
    page.fill("#legend input", "<i>keratin</i>")
    page.keyboard.press("Enter")
    page.wait_for_selector("#message.good:not([hidden])")
    assert page.locator("#message").inner_text() == "saved in words.csv: <i>keratin</i>"
    assert _names(page)[word] == "<i>keratin</i>" and page.locator("#legend i, #neighbours i").count() == 0
    assert "<i>keratin</i>" in page.locator("#tile-numbers").inner_text()
    assert "the same (<i>keratin</i>)" in page.locator("#shared").inner_text()
    same = page.locator("#neighbours button.same")
    titles = [same.nth(i).get_attribute("title") for i in range(same.count())]
    assert titles and all(title.endswith("<i>keratin</i>") for title in titles)
    assert page.evaluate("document.activeElement.matches('#legend input')")  # the next name can be typed
    with page.expect_download() as download:
        page.click("#export")
    collection = json.loads(download.value.path().read_text())
    names = {one["properties"]["classification"]["name"] for one in collection["features"]}
    assert "<i>keratin</i>" in names and f"Word {word + 1}" not in names
    with table.open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [
            "<i>keratin</i>" if i == word else "" for i in range(4)
        ]
    page.fill("#legend input", "")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#message').textContent.includes('removed')")
    assert table.read_bytes() == before and "names" not in page.url


def test_a_name_that_someone_else_wrote_is_not_replaced(browser, writable_address, table):
    """One message, the names that there are now, and what was typed, which a second Enter saves."""
    page = browser.new_page()
    _open(page, writable_address, "slide=one&only=1")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{line}theirs" for line in lines[1:])]) + "\n")
    page.fill("#legend input", "mine")
    page.keyboard.press("Enter")
    page.wait_for_selector("#message:not([hidden]):not(.good)")
    assert "found that someone changed it meanwhile; nothing was written" in page.locator("#message").inner_text()
    page.wait_for_function("() => document.querySelector('#legend .class').innerText.startsWith('theirs')")
    assert _names(page) == ["theirs"] * 4 and page.locator("#legend input").input_value() == "mine"
    assert table.read_text().count("theirs") == 4
    page.locator("#legend input").press("Enter")
    page.wait_for_selector("#message.good:not([hidden])")
    assert _names(page) == ["theirs", "mine", "theirs", "theirs"]
    page.close()


def test_attention_over_the_region_of_the_clicked_tile(page, writable_address, words_root):
    """The values of the server in viridis, the mark at the tile's cell, and the outline at its place on the slide."""
    catalogue = read_catalogue(words_root)
    region = catalogue.regions["one"][0]
    tile = next(i for i in range(400) if catalogue.region_of("one", i) == 0)
    x, y = catalogue.tiles["one"].coords[tile].tolist()
    _open(page, writable_address, "slide=one&overlay=none&view=280,320,1", "none")
    page.mouse.click(*_at(page, x + STEP / 2, y + STEP / 2))
    page.wait_for_selector("#region-mean canvas")
    captions = page.locator("#region-mean figcaption, #region-maps figcaption")
    assert captions.all_inner_texts() == ["mean", "1", "2"]
    found = page.evaluate(f"fetch('api/slides/one/attention/{tile}/region?encoder=random').then((one) => one.json())")
    read = "(one) => [one.width, one.height, ...one.getContext('2d').getImageData(0, 0, one.width, one.height).data]"
    for number, place in enumerate(
        ["#region-mean canvas", "#region-maps canvas >> nth=0", "#region-maps canvas >> nth=1"]
    ):
        width, height, *data = page.locator(place).evaluate(read)
        values = np.array(found["maps"][number])
        scaled = (values - values.min()) / (values.max() - values.min())
        colours = 255 * colormaps["viridis"](scaled)
        assert (width, height) == (4, 4) and np.abs(np.reshape(data, (16, 4)) - colours).max() < 15
    mark, picture = (page.locator(f"#region-mean {name}").bounding_box() for name in (".mark", "canvas"))
    column, row = (x - region.x) // STEP, (y - region.y) // STEP
    assert mark["x"] - picture["x"] == pytest.approx(column * picture["width"] / 4, abs=0.5)
    assert mark["y"] - picture["y"] == pytest.approx(row * picture["height"] / 4, abs=0.5)
    page.wait_for_function("() => document.querySelector('#region-picture').naturalWidth === 256")
    _loaded(page)
    box = page.locator("#zoom").bounding_box()
    left, top = (place - box[side] for place, side in zip(_at(page, region.x, region.y), ("x", "y"), strict=True))
    shown = _screenshot(page)
    border = np.abs(shown - (179, 0, 107)).max(2) < 40
    assert border[round(top + 100), round(left) - 2 : round(left) + 3].any()
    assert border[round(top + 100), round(left + 256) - 2 : round(left + 256) + 3].any()
    assert border[round(top + 256) - 2 : round(top + 256) + 3, round(left + 100)].any()
    page.mouse.click(*_at(page, -20, 300))  # nothing is selected there
    page.wait_for_selector("#tile", state="hidden")
    assert not (np.abs(_screenshot(page) - (179, 0, 107)).max(2) < 40).any()


def test_without_a_level_2_run_the_page_says_what_to_pass(page, address):
    _open(page, address, "slide=one&tile=64%2C64")
    page.wait_for_selector("#region-note:not(:empty)")
    assert (
        "pass a level-2 run of these features too: dino view root RUN LEVEL2_RUN"
        in page.locator("#region-note").inner_text()
    )
    assert page.locator("#region-row").is_hidden() and page.locator("#region-maps canvas").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier(browser, writable_address, words_root, table, scheme):
    """axe-core, with a word's field, a tile, its attention and neighbours shown, and with each kind of message."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    catalogue = read_catalogue(words_root)
    tile = next(i for i in range(400) if catalogue.region_of("one", i) == 0)
    x, y = catalogue.tiles["one"].coords[tile].tolist()
    page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme=scheme)
    _open(page, writable_address, f"slide=one&tile={x}%2C{y}&only=1&by=word&others=0")
    page.wait_for_selector("#region-mean canvas")
    page.wait_for_selector("#attention-maps canvas")
    page.wait_for_selector("#neighbours button.same, #neighbours button.other")
    assert _violations(axe, page) == []
    for name, message in (
        (f"fat, {scheme}", "#message.good:not([hidden])"),
        ("=1", "#message:not(.good):not([hidden])"),
    ):
        page.fill("#legend input", name)
        page.keyboard.press("Enter")
        page.wait_for_selector(message)
        assert _violations(axe, page) == []
    page.click("[data-overlay=similarity]")
    page.wait_for_selector("body[data-overlay-ready='similarity']")
    assert _violations(axe, page) == []
    page.close()


def _violations(axe, page):
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], [node["target"] for node in one["nodes"]]) for one in found]


def test_select_tiles_in_a_rectangle(page, address):
    _open(page, address, "slide=one&view=320,320,1")
    page.click("#rectangle")
    page.mouse.move(*_at(page, 70, 70))
    page.mouse.down()
    page.mouse.move(*_at(page, 70 + 3 * STEP, 70 + 2 * STEP), steps=4)
    page.mouse.up()
    assert page.locator("#selection-count").inner_text() == "6 tiles"
    page.fill("#selection-name", "<b>mine</b>")
    with page.expect_download() as download:
        page.click("#selection-download")
    collection = json.loads(download.value.path().read_text())
    corners = {tuple(one["geometry"]["coordinates"][0][0]) for one in collection["features"]}
    assert corners == {(STEP * i, STEP * j) for i in (1, 2, 3) for j in (1, 2)}
    assert collection["features"][0]["properties"]["classification"]["name"] == "<b>mine</b>"


def test_attention_of_a_slide_and_of_a_tile(page, address):
    """A map whose left half is low and right half is high; the colours on the page are the ends of viridis."""
    _open(page, address, "slide=one&overlay=attention&opacity=1&view=320,320,1", "attention")
    assert page.locator("#legend select option").all_inner_texts() == ["level 1", "product of both levels"]
    assert page.locator("#legend .ends").inner_text().split() == ["1.00", "3.00"]
    assert "Maps of an unknown model" in page.locator("#legend").inner_text()
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)
    picture, (left, top) = _screenshot(page), _at(page, 0, 0)
    box = page.locator("#zoom").bounding_box()
    left, top = left - box["x"], top - box["y"]
    for x, colour in ((300, (68, 1, 84)), (340, (253, 231, 37))):
        assert np.abs(picture[round(top + 300), round(left + x)] - colour).max() <= 1
    page.mouse.click(*_at(page, 300, 300))
    page.wait_for_selector("#attention-maps canvas")
    assert page.locator("#attention-maps figcaption").all_inner_texts() == ["mean", "1", "2"]
    page.wait_for_selector("#shared button")
    assert page.locator("#shared").inner_text().split() == ["centre", "16", "of", "16", "the", "same", "(A)"]
    page.click("#shared button")
    page.wait_for_function("() => document.querySelectorAll('#neighbours button.same').length === 16")


def test_neighbours_of_another_centre_are_framed(page, address):
    _open(page, address, "slide=two&tile=128%2C64&by=centre&view=320,320,1")  # the other patient is of centre A
    page.wait_for_function("() => document.querySelectorAll('#neighbours button.other').length === 16")
    assert "0 of 16 the same (B)" in page.locator("#shared").inner_text()
    page.select_option("#others", "0")
    page.wait_for_function("() => document.querySelectorAll('#neighbours button.same').length > 0")


def _screenshot(page):
    page.evaluate("for (const id of ['bar', 'scale', 'split']) document.getElementById(id).style.visibility = 'hidden'")
    page.evaluate("document.querySelector('.navigator').style.visibility = 'hidden'")
    return np.asarray(Image.open(io.BytesIO(page.locator("#zoom").screenshot())).convert("RGB")).astype(float)


def _loaded(page):
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1200)  # new tiles fade in


def _checkerboard(width, height, levels, names):
    """A deep-zoom tile of a slide whose cells are black and white, as a lossless picture."""
    level, column, row = names
    scale = 2 ** (levels - 1 - level)
    places = []
    for number, side in ((column, width), (row, height)):
        first, whole = number * TILE_PX - bool(number), -(-side // scale)
        places.append((np.arange(first, min((number + 1) * TILE_PX + 1, whole)) + 0.5) * scale // STEP)
    cells = (places[0][None] + places[1][:, None]) % 2
    content = io.BytesIO()
    Image.fromarray((255 * cells).astype(np.uint8)).convert("RGB").save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(("zoom", "ratio"), [(0.1, 1), (0.6, 1), (1.37, 1), (4.1, 1), (0.6, 1.5)])
def test_slide_and_overlay_are_in_their_place_to_the_pixel(browser, address, catalogue, zoom, ratio):
    """Both against pictures computed from the view in the address, on screens with one or more px per px of the page.

    The slide's tiles are replaced by those of a chequerboard: the slide's own colours, compressed, say to a few px only
    where it is. A cell of it is a tile.
    """
    tiles, status = catalogue.tiles[HOSTILE], catalogue.slides.status[HOSTILE]
    width, height = status.width, status.height
    levels = math.ceil(math.log2(max(width, height))) + 1
    page = browser.new_page(viewport={"width": 1200, "height": 800}, device_scale_factor=ratio)

    def replace_tile(route):
        names = re.search(r"/zoom/(\d+)/(\d+)_(\d+)\.jpg", route.request.url)
        assert names is not None
        content = _checkerboard(width, height, levels, [int(name) for name in names.groups()])
        route.fulfill(body=content, content_type="image/png")

    page.route("**/zoom/**", replace_tile)
    centre = (width - 200 / zoom, height - 150 / zoom) if zoom > 1 else (width / 2 + 0.3, height / 2 + 0.3)
    view = [round(centre[0]) + 0.3 * (zoom > 1), round(centre[1]) + 0.3, zoom]
    _open(page, address, f"slide={quote(HOSTILE)}&overlay=colours&opacity=0&view={','.join(map(str, view))}", "colours")
    _loaded(page)
    shown = {"slide": _screenshot(page)}
    page.evaluate(
        "const slider = document.querySelector('#opacity'); slider.value = 1; slider.dispatchEvent(new Event('input'))"
    )
    page.wait_for_timeout(300)
    shown["overlay"] = _screenshot(page)
    box = page.locator("#zoom").bounding_box()
    page.close()

    x, y = (
        view[axis] + ((np.arange(shown["slide"].shape[1 - axis] - 1) + 0.5) / ratio - box[side] / 2) / zoom
        for axis, side in enumerate(("width", "height"))
    )  # on the slide, of each px of the screenshot but the last ones, of which a screen may have a part only
    on_slide = ((y > 0) & (y < height))[:, None] & ((x > 0) & (x < width))[None]
    cells = (x // STEP)[None] + 1j * (y // STEP)[:, None]
    apart = [np.abs(one - STEP * np.round(one / STEP)) * zoom * ratio for one in (x, y)]
    to_border = np.minimum(apart[0][None], apart[1][:, None])  # px of the screen
    colours = EncoderFeatures(catalogue, "random", 4).rgb(HOSTILE)
    of_cell = {a // STEP + 1j * (b // STEP): rgb for (a, b), rgb in zip(tiles.coords.tolist(), colours, strict=True)}
    covered = np.isin(cells, list(of_cell)) & on_slide
    expected = np.zeros((*cells.shape, 3))
    for cell, rgb in of_cell.items():
        expected[cells == cell] = rgb
    found = shown["overlay"][:-1, :-1]
    wrong = covered & (np.abs(found - expected).max(2) > 0)
    assert covered.sum() > 1_000 and to_border[wrong].max(initial=0) <= 0.05  # a border may be at the middle of a px
    white = (cells.real + cells.imag) % 2 == 1
    wrong = on_slide & ((shown["slide"][:-1, :-1, 0] > 127) != white)
    assert to_border[wrong].max(initial=0) <= (0.25 if zoom < 2 else 1.0)  # enlarged px are smoothed


def test_compare_two_encoders(page, address):
    state = "slide=two&overlay=colours&opacity=1&view=330,300,1&a=random"
    shown = {}
    for name, more in (("A", ""), ("B", "&a=second"), ("both", "&b=second&split=0.5")):
        page.goto("about:blank")  # a new # alone does not load a page again
        _open(page, address, (state if name != "B" else state.replace("&a=random", "")) + more, "colours")
        _loaded(page)
        shown[name] = _screenshot(page)
    width = shown["A"].shape[1]
    left, right = slice(0, width // 2 - 15), slice(width // 2 + 15, width)
    assert np.array_equal(shown["both"][:, left], shown["A"][:, left])
    assert np.array_equal(shown["both"][:, right], shown["B"][:, right])
    assert not np.array_equal(shown["A"], shown["B"])
