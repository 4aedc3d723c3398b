"""The addresses of the viewer: answers, refusals, and requests that are hostile."""

import io
import json
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.viewer.conftest import HOSTILE, UNIT, write_maps

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from dino.extraction.encoder_features import EncoderFeatures
from dino.viewer.attention import AttentionFiles
from dino.viewer.guard import LOCAL_HOSTS, Allowance, Guard
from dino.viewer.pixels import OVERLAP_PX, TILE_PX, SlidePixels
from dino.viewer.server import ASSETS, Viewer, build_app

TOKEN = "a-token-of-the-tests"


def _client(catalogue, writable=False, with_token=True, **more):
    encoders = {"random": EncoderFeatures(catalogue, "random", 4)}
    viewer = Viewer(catalogue, encoders, SlidePixels(catalogue.slides), writable, **more)
    app = Guard(build_app(viewer), TOKEN, LOCAL_HOSTS, writable)
    client = TestClient(app, base_url="http://127.0.0.1:8765", raise_server_exceptions=False)
    if with_token:
        assert client.get(f"/?token={TOKEN}").status_code == 200
    return client


@pytest.fixture(scope="module")
def client(catalogue):
    return _client(catalogue)


def _picture(response):
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def test_only_who_knows_the_token_gets_an_answer(catalogue):
    stranger = _client(catalogue, with_token=False)
    for path in ("/", "/api/root", "/static/viewer.js", "/slides/one/thumbnail.jpg", "/?token=wrong", "/nothing"):
        response = stranger.get(path)
        assert (response.status_code, response.headers["content-type"]) == (403, "text/plain; charset=utf-8")
    response = stranger.get(f"/?token={TOKEN}")
    cookie = response.headers["set-cookie"]
    assert response.status_code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert stranger.get("/api/root").status_code == 200  # by the cookie


def test_every_answer_has_the_headers_that_protect_the_page(client, catalogue):
    for response in (client.get("/"), client.get("/api/root"), client.get("/nothing"), client.post("/api/root")):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_from_elsewhere():
    folder = Path(__file__).parents[2] / "dino" / "viewer" / "static"
    own = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert set(own) < set(ASSETS)
    for name in own:
        text = (folder / name).read_text()
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
        assert "innerHTML" not in text and "eval(" not in text  # names of slides are put in as text only


def test_requests_for_another_host_are_refused(client):
    assert client.get("/api/root", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/api/root", headers={"host": "localhost:9"}).status_code == 200


def test_size_and_rate_are_limited(client, catalogue):
    assert client.get("/api/root?" + "a" * 3000).status_code == 414
    assert client.request("GET", "/api/root", content=b"x" * 10).status_code == 413
    assert client.post("/api/root", json={}).status_code == 405
    clock = [0.0]
    allowance = Allowance(2.0, 3.0, lambda: clock[0])
    assert [allowance.take("a") for _ in range(5)] == [True, True, True, False, False]
    assert allowance.take("b")
    clock[0] = 1.0
    assert [allowance.take("a") for _ in range(3)] == [True, True, False]


def test_wrong_tokens_are_limited(catalogue):
    stranger = _client(catalogue, with_token=False)
    assert {stranger.get("/?token=guess").status_code for _ in range(40)} == {403, 429}


def test_root_lists_slides_without_paths(client, catalogue):
    content = client.get("/api/root").json()
    assert {one["slide_id"] for one in content["slides"]} == set(catalogue.slides.status)
    assert str(catalogue.root.parent) not in json.dumps(content)
    assert content["encoders"] == ["random"]


def test_a_slide_id_with_html_is_data_not_html(client):
    content = client.get(f"/api/slides/{quote(HOSTILE, safe='')}").json()
    assert content["slide_id"] == HOSTILE
    assert client.get(f"/slides/{quote(HOSTILE, safe='')}/thumbnail.jpg").status_code == 200


def test_tiles_and_regions_are_those_of_the_tables(client, catalogue):
    content, tiles = client.get("/api/slides/two").json(), catalogue.tiles["two"]
    assert (content["width"], content["height"]) == (764, 640)
    np.testing.assert_array_equal(np.stack([content["tiles"]["x"], content["tiles"]["y"]], 1), tiles.coords)
    assert content["tiles"]["step"] == 64
    assert [one[:2] for one in content["regions"]] == [[one.x, one.y] for one in catalogue.regions["two"]]
    assert all(one[2:] == [256, 256] for one in content["regions"])


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_a_deep_zoom_tile_shows_the_pixels_at_its_place(client, reduction):
    """On a slide that is painted with its coordinates, red and green of a pixel say where it is, at every level."""
    level = 10 - reduction  # 764 px need 10 levels
    scale = 2**reduction
    width, height = -(-764 // scale), -(-640 // scale)
    for column in range(-(-width // TILE_PX)):
        for row in range(-(-height // TILE_PX)):
            pixels = _picture(client.get(f"/slides/two/zoom/{level}/{column}_{row}.jpg")).astype(float)
            left, top = (max(0, n * TILE_PX - OVERLAP_PX) for n in (column, row))
            h, w = pixels.shape[:2]
            x, y = (left + np.arange(w) + 0.5) * scale, (top + np.arange(h) + 0.5) * scale
            across, down = pixels[..., 0] - (x / UNIT - 0.5), pixels[..., 1] - (y / UNIT - 0.5)[:, None]
            for error in (across, down):  # 1 is UNIT px; single pixels have the noise of JPEG
                assert abs(error.mean()) < 0.5 and np.abs(error).mean() < 1


def test_a_tile_shows_the_pixels_of_its_cell(client, catalogue):
    for tile in (0, 13, 40):
        x, y = catalogue.tiles["one"].coords[tile]
        pixels = _picture(client.get(f"/slides/one/tiles/{tile}.jpg")).reshape(-1, 3).mean(0)
        assert pixels[:2] == pytest.approx([(x + 32) / UNIT - 0.5, (y + 32) / UNIT - 0.5], abs=0.5)


def test_overlays_are_those_of_the_features(client, catalogue):
    count = len(catalogue.tiles["one"].coords)
    clusters = client.get("/api/slides/one/clusters?encoder=random").json()
    colours = client.get("/api/slides/one/colours?encoder=random").json()
    similar = client.get("/api/slides/one/similarity?encoder=random&tile=3").json()
    assert len(clusters) == len(colours) == len(similar) == count
    assert set(clusters) <= set(range(4)) and similar[3] == 1
    legend = client.get("/api/legend?encoder=random").json()
    assert not legend["words"] and len(legend["clusters"]) == 4 and all(one["examples"] for one in legend["clusters"])
    found = client.get("/api/slides/one/neighbours/3?encoder=random&count=5").json()
    neighbours = found["neighbours"]
    assert found["word"] is None  # clusters
    assert len(neighbours) == 5 and {one["patient_id"] for one in neighbours} == {"P2"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/slides/none/thumbnail.jpg", 404),
        ("/slides/one/zoom/99/0_0.jpg", 422),
        ("/slides/one/zoom/10/99_0.jpg", 422),
        ("/slides/one/zoom/-1/0_0.jpg", 404),
        ("/slides/one/zoom/1/0_0.png", 404),
        ("/slides/one/tiles/999999.jpg", 404),
        ("/slides/one/tiles/٣.jpg", 404),
        ("/slides/one/tiles/99999999999999999999999.jpg", 404),
        ("/api/slides/one/clusters", 404),
        ("/api/slides/one/clusters?encoder=../x", 404),
        ("/api/slides/one/neighbours/0?encoder=random&count=100000", 422),
        ("/api/slides/one/similarity?encoder=random", 404),
        ("/api/slides/one/similarity?encoder=random&of=none&tile=0", 404),
        ("/static/../server.py", 404),
        ("/static/%2e%2e/server.py", 404),
        ("/static/..%2fserver.py", 404),
        ("/slides/..%2f..%2fetc%2fpasswd/thumbnail.jpg", 404),
        ("/slides/%2e%2e/thumbnail.jpg", 404),
    ],
)
def test_what_is_not_there_is_one_line(client, path, status):
    response = client.get(path)
    assert response.status_code == status
    assert len(response.json()["error"].splitlines()) == 1


def test_a_slide_that_became_unreadable_is_one_line(catalogue, monkeypatch, client):
    pixels = SlidePixels(catalogue.slides)
    monkeypatch.setattr(type(catalogue.slides), "path", lambda self, slide_id: None)
    with pytest.raises(Exception, match="expected the file of slide 'one', found none"):
        pixels.thumbnail("one", 100)


def test_memory_is_bounded(catalogue):
    pixels = SlidePixels(catalogue.slides, open_slides=2, cache_mb=1)
    pixels.pictures._max_bytes = 20_000
    for slide_id in ("one", "two", HOSTILE, "one"):
        for column in range(3):
            pixels.tile(slide_id, 10, column, 0)
        assert len(pixels._open) <= 2
    kept = pixels.pictures
    assert kept.bytes == sum(len(content) for content in kept._pictures.values()) <= 20_000


def test_selections_are_saved_only_with_annotate(catalogue, client):
    assert client.post("/api/slides/one/selections", json={"name": "a", "tiles": [0]}).status_code == 405
    writing = _client(catalogue, writable=True)
    address, file = "/api/slides/one/selections", catalogue.root / "annotations" / "one.geojson"
    assert writing.post(address, json={"name": "keratin", "tiles": [0, 1, 1]}).json() == {"saved": "one.geojson"}
    assert writing.post(address, json={"name": "other", "tiles": [2]}).status_code == 200
    assert writing.post(address, json={"name": "keratin", "tiles": [5]}).status_code == 200
    saved = json.loads(file.read_text())["features"]
    assert {one["properties"]["name"]: one["properties"]["measurements"]["Tiles"] for one in saved} == {
        "other": 1,
        "keratin": 1,
    }
    before = file.read_bytes()
    bad = [{}, [], {"name": "", "tiles": [0]}, {"name": "a\nb", "tiles": [0]}, {"name": "a", "tiles": [10**6]}]
    bad += [{"name": "a", "tiles": ["0"]}, {"name": "a", "tiles": []}, {"name": ["a"], "tiles": [0]}]
    assert {writing.post(address, json=body).status_code for body in bad} == {422}
    assert writing.post(address, content=b"name=a", headers={"content-type": "text/plain"}).status_code == 415
    assert writing.post(address, content=b"\xff{", headers={"content-type": "application/json"}).status_code == 422
    assert writing.post(address, content=b"x" * 2**21, headers={"content-type": "application/json"}).status_code == 413
    assert file.read_bytes() == before
    file.unlink()


def test_downloaded_tiles_have_the_attention_of_the_encoder(catalogue, client, tmp_path):
    """1 in the left half of the map, 3 in the right one; nothing where an encoder or a slide has no map."""
    write_maps(catalogue, tmp_path)
    mapped = _client(catalogue, attention={"random": AttentionFiles(catalogue, tmp_path)})

    def measured(client, slide):
        features = client.get(f"/api/slides/{slide}/geojson?encoder=random").json()["features"]
        tiles = [one for one in features if one["properties"]["objectType"] == "tile"]
        name, columns = "Attention random: within the tile: Max", catalogue.slides.status["one"].width // 64
        return {
            (one["geometry"]["coordinates"][0][0][0] >= 64 * columns / 2, one["properties"]["measurements"].get(name))
            for one in tiles
        }

    assert measured(mapped, "one") == {(False, 1.0), (True, 3.0)}
    assert {value for _, value in measured(mapped, "two") | measured(client, "one")} == {None}


class Numbered:
    """Attention of a level-2 model: the mean of a cell is its number, the values of the head are that of the region."""

    def maps(self, slide_id, region):
        return np.stack([np.arange(16.0).reshape(4, 4), np.full((4, 4), float(region))])


def test_attention_over_the_region_of_a_tile(catalogue, tmp_path):
    """Of a level-2 model, of the maps of `dino attention`, or none; a cell is the tile's place in the box."""
    tiles = catalogue.tiles["one"].coords.tolist()
    inside = [i for i, (x, y) in enumerate(tiles) if (x // 256, y // 256) == (0, 0)]
    outside = next(i for i, (x, y) in enumerate(tiles) if x >= 512)  # there are regions of 256 px in a slide of 700
    address = "/api/slides/one/attention/{}/region?encoder=random"
    with_model = _client(catalogue, regions={"random": Numbered()})
    for tile in inside:
        found = with_model.get(address.format(tile)).json()
        x, y, width, height = found["box"]
        assert [x, y] in [[one.x, one.y] for one in catalogue.regions["one"]] and (width, height) == (256, 256)
        assert [x + 64 * found["cell"][0], y + 64 * found["cell"][1]] == tiles[tile]
        assert found["computed"] and not found["loading"] and found["side"] == 4
        assert found["maps"] == [list(range(16)), [found["region"]] * 16]
        pixels = _picture(with_model.get(f"/slides/one/regions/{found['region']}.jpg")).reshape(-1, 3).mean(0)
        assert pixels[:2] == pytest.approx([(x + 128) / UNIT - 0.5, (y + 128) / UNIT - 0.5], abs=1.0)
    assert with_model.get(address.format(outside)).json() is None
    assert with_model.get("/slides/one/regions/999.jpg").status_code == 404
    loading = _client(catalogue, regions={"random": None}).get(address.format(inside[0])).json()
    assert loading["maps"] is None and loading["loading"]
    without = _client(catalogue).get(address.format(inside[0])).json()
    assert without["maps"] is None and not without["loading"]
    write_maps(catalogue, tmp_path, ["region", "tile x region"])
    files = _client(catalogue, attention={"random": AttentionFiles(catalogue, tmp_path)})
    found = files.get(address.format(inside[0])).json()
    assert not found["computed"] and len(found["maps"]) == 1 and set(found["maps"][0]) <= {1.0, 3.0}


SEGMENTS = st.one_of(
    st.sampled_from(
        [
            "api",
            "slides",
            "one",
            "two",
            "zoom",
            "tiles",
            "regions",
            "attention",
            "0",
            "static",
            "..",
            "%2e%2e",
            "%00",
            "clusters",
            "10",
        ]
    ),
    st.sampled_from(
        ["0_0.jpg", "0.jpg", "-1_0.jpg", "1e9_0.jpg", "thumbnail.jpg", "etc%2fpasswd", "legend", "geojson", "region"]
    ),
    st.text(max_size=12).map(lambda text: quote(text, safe="", errors="replace")),
)
QUERIES = st.dictionaries(
    st.sampled_from(["encoder", "tile", "count", "of", "others", "token", "x"]),
    st.one_of(st.sampled_from(["random", "0", "-1", "one", "nan", "1e400", "../.."]), st.text(max_size=8)),
    max_size=3,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SEGMENTS, max_size=6), QUERIES, st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "TRACE"]))
def test_hostile_requests_get_one_line_and_no_other_file(client, segments, query, method):
    path = "/" + "/".join(segments).lstrip("/")  # the client refuses a path that starts with two
    text = "&".join(f"{name}={quote(value, safe='', errors='replace')}" for name, value in query.items())
    response = client.request(method, f"http://127.0.0.1:8765{path}?{text}")
    assert response.status_code < 500
    assert b"Traceback" not in response.content and b"root:" not in response.content
    kinds = ("image/jpeg", "application/json", "application/geo+json", "text/")
    assert response.headers.get("content-type", "text/").startswith(kinds)
