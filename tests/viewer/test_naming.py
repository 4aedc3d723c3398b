"""Names of words that are typed in the viewer: saved for the whole ROOT, refused where they could do harm."""

import csv
import json
import shutil
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dino import api
from dino.config.load import load_config
from dino.config.schema import WordsConfig
from dino.extraction.catalogue import read_catalogue
from dino.extraction.encoder_features import EncoderFeatures
from dino.viewer.pixels import SlidePixels

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from dino.viewer.guard import LOCAL_HOSTS, Guard
from dino.viewer.server import Viewer, build_app

TOKEN, COUNT = "a-token-of-the-tests", 4
ADDRESS = "/api/words?encoder=random"


@pytest.fixture(scope="module")
def root(painted, features, tmp_path_factory):
    """A ROOT of its own, with words of the encoder "random"; a column of someone else is in their table."""
    root = shutil.copytree(painted, tmp_path_factory.mktemp("naming") / "root")
    api.find_words("random", root, load_config(WordsConfig, overrides={"count": COUNT}))
    table = root / "words_random" / "words.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},seen by", *(f"{line},Dr. {i}" for i, line in enumerate(lines))]) + "\n")
    return root


@pytest.fixture
def table(root):
    table = root / "words_random" / "words.csv"
    before = table.read_bytes()
    yield table
    table.write_bytes(before)


def _client(root, writable=True, clusters=None):
    catalogue = read_catalogue(root)
    encoders = {"random": EncoderFeatures(catalogue, "random", clusters)}
    app = Guard(
        build_app(Viewer(catalogue, encoders, SlidePixels(catalogue.slides), writable)), TOKEN, LOCAL_HOSTS, writable
    )
    client = TestClient(app, base_url="http://127.0.0.1:8765", raise_server_exceptions=False)
    assert client.get(f"/?token={TOKEN}").status_code == 200
    return client


@pytest.fixture(scope="module")
def client(root):
    return _client(root)


def _legend(client):
    return client.get("/api/legend?encoder=random").json()


def _rows(table):
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_name_is_shown_everywhere_at_once(root, client, table):
    before, legend = _rows(table), _legend(client)
    assert legend["words"] and [one["name"] for one in legend["clusters"]] == [f"Word {n}" for n in range(1, COUNT + 1)]
    saved = client.post(ADDRESS, json={"word": 1, "name": " <b>fat</b> ", "version": legend["version"]}).json()
    assert saved == _legend(client) and saved["version"] != legend["version"]
    assert [one["written"] for one in saved["clusters"]] == ["", "<b>fat</b>", "", ""]
    before[1]["name"] = "<b>fat</b>"
    assert _rows(table) == before
    again = {"word": 2, "name": "<b>fat</b>", "version": saved["version"]}
    clusters = client.post(ADDRESS, json=again).json()["clusters"]
    assert clusters[1]["colour"] == clusters[2]["colour"]  # one name, one colour
    names = [one["name"] for one in clusters]
    with (root / "words_random" / "tiles.csv").open(newline="") as file:
        words = {(row["slide_id"], row["x"], row["y"]): int(row["word"]) - 1 for row in csv.DictReader(file)}
    for slide_id in ("one", "two"):
        tiles = client.get(f"/api/slides/{slide_id}/geojson?encoder=random").json()["features"]
        for one in (one for one in tiles if one["properties"]["objectType"] == "tile"):
            x, y = (str(int(value)) for value in one["geometry"]["coordinates"][0][0])
            assert one["properties"]["classification"]["name"] == names[words[slide_id, x, y]]
        found = client.get(f"/api/slides/{slide_id}/neighbours/3?encoder=random&others=0").json()
        x, y = read_catalogue(root).tiles[slide_id].coords[3].tolist()
        assert found["word"] == words[slide_id, str(x), str(y)]
        places = [(one["slide_id"], str(one["x"]), str(one["y"])) for one in found["neighbours"]]
        assert [one["word"] for one in found["neighbours"]] == [words[place] for place in places]


def test_a_name_is_not_saved_over_what_someone_wrote_meanwhile(client, table):
    version = _legend(client)["version"]
    table.write_bytes(theirs := table.read_bytes().replace(b"Dr. 0", b"Dr. X"))
    response = client.post(ADDRESS, json={"word": 0, "name": "keratin", "version": version})
    assert response.status_code == 409
    (line,) = response.json()["error"].splitlines()
    assert line.startswith("expected words.csv as it was read, found that someone changed it meanwhile; nothing was wr")
    assert str(table.parent) not in line and table.read_bytes() == theirs
    answer = client.post(ADDRESS, json={"word": 0, "name": "keratin", "version": _legend(client)["version"]})
    assert answer.status_code == 200 and _rows(table)[0] | {"tiles": "", "slides": "", "patients": "", "share": ""} == {
        "word": "1", "tiles": "", "slides": "", "patients": "", "share": "", "name": "keratin", "seen by": "Dr. X"
    }  # fmt: skip


def test_names_are_saved_only_with_annotate_and_only_of_words(root, client, table):
    before, body = table.read_bytes(), {"word": 0, "name": "keratin", "version": _legend(client)["version"]}
    assert _client(root, writable=False).post(ADDRESS, json=body).status_code == 405
    response = _client(root, clusters=3).post(ADDRESS, json=body)
    assert response.status_code == 422 and "found clusters; run `dino words`" in response.json()["error"]
    assert client.post("/api/words?encoder=other", json=body).status_code == 404
    assert client.get(ADDRESS).status_code == 404
    assert table.read_bytes() == before


def test_only_the_viewers_own_page_saves_names(root, client, table):
    before, body = table.read_bytes(), {"word": 0, "name": "keratin", "version": _legend(client)["version"]}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1:8765.evil.example"):
        response = client.post(ADDRESS, json=body, headers={"origin": origin})
        assert response.status_code == 403 and response.text == (
            "expected a request of the viewer's own page, found one of another page\n"
        )
    assert client.post(ADDRESS, content=json.dumps(body), headers={"content-type": "text/plain"}).status_code == 415
    stranger = TestClient(client.app, base_url="http://127.0.0.1:8765")
    assert stranger.post(ADDRESS, json=body).status_code == 403
    assert table.read_bytes() == before
    assert client.post(ADDRESS, json=body, headers={"origin": "http://127.0.0.1:8765"}).status_code == 200


def _stamps(root, table):
    """When each file but the table was changed."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path != table}


BODIES = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "word": st.one_of(st.integers(-2, 6), st.booleans(), st.just(10**30), st.none(), st.text(max_size=3)),
            "name": st.one_of(st.text(max_size=120), st.sampled_from(["=1+1", "a\nb", '"', ";,\t"]), st.integers()),
            "version": st.one_of(st.just("now"), st.text(max_size=4), st.none()),
        },
    ),
    st.recursive(st.one_of(st.none(), st.integers(), st.text(max_size=5)), lambda inner: st.lists(inner, max_size=3)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BODIES, st.sampled_from(["random", "other", "../..", ""]) | st.text(max_size=5))
def test_hostile_names_are_one_line_and_lose_nothing(client, root, body, encoder):
    table = root / "words_random" / "words.csv"
    before, text = table.read_bytes(), json.dumps(body)
    if isinstance(body, dict) and body.get("version") == "now":
        text = json.dumps(body | {"version": _legend(client)["version"]})
    rows, others = _rows(table), _stamps(root, table)
    response = client.post(
        f"/api/words?encoder={quote(encoder, safe='', errors='replace')}",
        content=text,
        headers={"content-type": "application/json"},
    )
    assert response.status_code in (200, 404, 409, 422)
    assert b"Traceback" not in response.content
    assert _stamps(root, table) == others
    if response.status_code == 200:
        rows[body["word"]]["name"] = response.json()["clusters"][body["word"]]["written"]
        assert _rows(table) == rows
    else:
        assert len(response.json()["error"].splitlines()) == 1 and table.read_bytes() == before
