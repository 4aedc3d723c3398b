"""The viewer in a real browser: Debian's Chromium, driven by Playwright. Skipped where one of them is not installed."""

import io
import json
import math
import re
import shutil
import socket
import threading
import time
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from dino.extraction.encoder_features import EncoderFeatures
from dino.viewer.pixels import TILE_PX
from tests.tiny_models import save_checkpoint
from tests.viewer.conftest import HOSTILE, write_features, write_maps

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKEN = "a-token-of-the-tests"
STEP = 64  # side of a tile, level-0 px
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")


@pytest.fixture(scope="module")
def address(painted, features, tmp_path_factory):
    """A running viewer of the painted slides, with two encoders."""
    from dino.extraction.catalogue import read_catalogue
    from dino.models.weights import load_backbone_file
    from dino.viewer.attention import AttentionFiles, TileAttention
    from dino.viewer.guard import LOCAL_HOSTS, Guard
    from dino.viewer.pixels import SlidePixels
    from dino.viewer.server import Viewer, build_app

    write_features(painted, "second", seed=1)
    catalogue = read_catalogue(painted)
    encoders = {name: EncoderFeatures(catalogue, name, 4) for name in ("random", "second")}
    folder = tmp_path_factory.mktemp("maps")
    write_maps(catalogue, folder)
    maps = {"random": AttentionFiles(catalogue, folder)}
    model = TileAttention(catalogue, load_backbone_file(save_checkpoint(folder / "model.pt")))
    pixels = SlidePixels(catalogue.slides)
    viewer = Viewer(catalogue, encoders, pixels, attention=maps, models={"random": model})
    app = Guard(build_app(viewer), TOKEN, LOCAL_HOSTS)
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
    shutil.rmtree(painted / "features_second")  # the ROOT is that of other tests too


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
