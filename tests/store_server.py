"""A web server and S3 endpoint that fails in given ways: the first folder of an address names the fault.

Run as a program: ``python store_server.py FOLDER``. The files of FOLDER are served under ``/<fault>/<name>``, and each
request is a line of ``FOLDER/requests.log``: method, path, and first byte asked for.
"""

import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

LOG = "requests.log"
SEEN: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()
    lock = threading.Lock()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        _, fault, *names = address.path.split("/")
        name = "/".join(names)
        given = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(given[1]) if given and fault != "whole" else 0
        with self.lock:
            SEEN[f"{self.command} {address.path}"] += 1
            times = SEEN[f"{self.command} {address.path}"]
            with (self.folder / LOG).open("a") as log:
                log.write(f"{self.command} {address.path} {first}\n")
        file = self.folder / name
        if "list-type" in address.query:
            return self._list(fault, parse_qs(address.query).get("prefix", [""])[0])
        if fault in ("403", "404", "500") or not file.is_file():
            return self._status(int(fault) if fault.isdigit() else 404)
        if fault == "busy" and times <= 2:
            return self._status(503)
        content = file.read_bytes()
        last = min(int(given[2]), len(content) - 1) if given and given[2] else len(content) - 1
        self._send(content, first, last, fault, times)

    def _send(self, content: bytes, first: int, last: int, fault: str, times: int) -> None:
        body = content[first : last + 1]
        partial = "Range" in self.headers and fault != "whole"
        self.send_response(206 if partial else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{md5(content).hexdigest()}"')
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 10:00:00 GMT")
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncated" and len(body) > 5000:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(0.3)  # until it has been read: what a client has not read when a connection ends is lost
            self.close_connection = True
        elif fault == "reset" and times <= 2:
            self.wfile.write(body[: len(body) // 3])
            self.wfile.flush()
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once, though files of it are open
            self.close_connection = True
        elif fault == "silent" and times <= 1:
            self.wfile.write(body[:10])
            self.wfile.flush()
            time.sleep(3)
            self.close_connection = True
        elif fault == "drip" and times <= 1:
            for start in range(0, len(body), 1000):
                self.wfile.write(body[start : start + 1000])
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(body)

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, bucket: str, prefix: str) -> None:
        found = [path for path in sorted(self.folder.glob("**/*.tiff")) if str(path.name).startswith(prefix)]
        items = "".join(
            f"<Contents><Key>{path.name}</Key><Size>{path.stat().st_size}</Size><ETag>&quot;0&quot;</ETag>"
            "<LastModified>2026-11-26T10:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for path in found
        )
        namespace = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
        body = (
            f"<?xml version='1.0'?><ListBucketResult {namespace}><Name>{bucket}</Name><KeyCount>{len(found)}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@dataclass(frozen=True)
class Store:
    """A server that runs: its address, and the folder that it serves."""

    address: str
    folder: Path

    def requests(self, method: str, path: str) -> list[int]:
        """First bytes that were asked for, of each request."""
        log = self.folder / LOG
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [int(first) for verb, found, first in lines if (verb, found) == (method, path)]


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """A server in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Store(f"http://127.0.0.1:{int(process.stdout.readline())}", folder)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
