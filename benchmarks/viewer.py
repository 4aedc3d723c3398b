"""`python -m benchmarks.viewer ROOT OUTPUT.json`: latency and memory of `dino view` on the slides of a ROOT.

The server is another process. Clients are threads of this one; each asks for deep-zoom tiles at random places of the
last three levels, as a browser does for someone who moves over a slide. Needs features of tiles in ROOT.
"""

import argparse
import http.client
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from dino import viewer

STATIC = Path(viewer.__file__).parent / "static"
SCRIPTS = [f"/static/{path.name}" for path in sorted(STATIC.glob("*.js"))]  # a browser loads all of them
CLIENTS, TILES = 20, 60  # clients at once, and tiles that each of them asks for
ALONE = 300  # tiles of a single client


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "dino", "view", str(arguments.root), "port=0"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = next(match for line in server.stdout if (match := re.search(r"http://\S+", line)))
        try:
            result = {"seconds_until_the_server_answers": round(time.perf_counter() - start, 2)}
            result |= measure(found[0], server.pid)
        finally:
            server.terminate()
    text = json.dumps(result, indent=1)
    arguments.output.write_text(text + "\n")
    print(text)


def measure(address: str, pid: int) -> dict[str, Any]:
    """All figures of a running viewer.

    Args:
        address: Its address with the token.
        pid: Its process, for the memory.
    """
    client = Client(address)
    start = time.perf_counter()
    root = client.json("/api/root")
    slides = [one for one in root["slides"] if one["readable"] and one["tiles"]]
    for path in ("/", "/static/vendor/openseadragon.min.js", "/static/style.css", *SCRIPTS):
        client.get(path)
    client.json(f"/api/slides/{quote(slides[0]['slide_id'])}")
    for path in _paths(slides[0], levels=[9]):
        client.get(path)
    first = time.perf_counter() - start
    for one in slides:
        client.get(_paths(one, [9])[0])  # opens the slide
    alone = client.seconds(_drawn(slides, ALONE, seed=0))
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        jobs = [pool.submit(Client(address).seconds, _drawn(slides, TILES, seed=1 + i)) for i in range(CLIENTS)]
        together = [seconds for job in jobs for seconds in job.result()]
    duration = time.perf_counter() - started
    again = Client(address).seconds(  # the first connection may have been closed meanwhile
        _drawn(slides, ALONE, seed=0)
    )
    return {
        "computer": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "slides": [f"{one['width']} x {one['height']}" for one in slides],
        "first_picture_seconds": round(first, 3),
        "tile_ms_one_client": _percentiles(alone),
        "tile_ms_one_client_from_memory": _percentiles(again),
        f"tile_ms_{CLIENTS}_clients": _percentiles(together),
        "tiles_per_second": round(len(together) / duration),
        "peak_memory_mb": _peak_mb(pid),
    }


class Client:
    """A connection to the viewer.

    Args:
        address: Its address with the token.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=60)
        self._cookie = f"dino_view={parts.query.partition('=')[2]}"

    def get(self, path: str) -> bytes:
        """The content of an address; RuntimeError for any answer but 200."""
        self._connection.request("GET", path, headers={"cookie": self._cookie})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {content[:200]!r}")
        return content

    def json(self, path: str) -> Any:
        """The JSON of an address."""
        return json.loads(self.get(path))

    def seconds(self, paths: Sequence[str]) -> list[float]:
        """How long each of some addresses took."""
        taken = []
        for path in paths:
            start = time.perf_counter()
            self.get(path)
            taken.append(time.perf_counter() - start)
        return taken


def _levels(slide: dict[str, Any]) -> int:
    """Number of levels of a Deep Zoom Image."""
    return int(np.ceil(np.log2(max(slide["width"], slide["height"])))) + 1


def _paths(slide: dict[str, Any], levels: Sequence[int]) -> list[str]:
    """Addresses of all tiles of some levels."""
    found = []
    for level in levels:
        scale = 2 ** (_levels(slide) - 1 - level)
        columns, rows = (int(np.ceil(np.ceil(slide[side] / scale) / 254)) for side in ("width", "height"))
        base = f"/slides/{quote(slide['slide_id'])}/zoom/{level}"
        found += [f"{base}/{column}_{row}.jpg" for row in range(rows) for column in range(columns)]
    return found


def _drawn(slides: Sequence[dict[str, Any]], count: int, seed: int) -> list[str]:
    """Random tiles of the last three levels of all slides."""
    paths = [path for one in slides for path in _paths(one, range(_levels(one) - 3, _levels(one)))]
    return [paths[i] for i in np.random.default_rng(seed).integers(0, len(paths), count)]


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum in ms."""
    p50, p95 = np.percentile(seconds, [50, 95])
    return {name: round(1000 * float(value), 1) for name, value in (("p50", p50), ("p95", p95), ("max", max(seconds)))}


def _peak_mb(pid: int) -> int | None:
    """Peak resident memory of a process in MB, on Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return round(int(found[1]) / 1024) if found else None


if __name__ == "__main__":
    main()
