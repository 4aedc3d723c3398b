"""Who may ask the viewer for what: token and cookie, limits on requests, and the headers of every answer."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

COOKIE = "dino_view"
MAX_QUERY = 2_000  # characters of a query
MAX_BODY = 2**20  # bytes of a body, which only annotate=true reads
RATE, BURST = 400.0, 2_000.0  # requests a second of one address, and at once
WRONG_TOKENS = 20.0  # attempts at once with a wrong token; one more each second
MAX_ADDRESSES = 1_000
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")

HEADERS = {
    # The hash is that of the one style sheet that OpenSeadragon adds; nothing is loaded from elsewhere.
    "content-security-policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

Scope = dict[str, Any]


class Allowance:
    """A number of requests per second and address, with a reserve.

    Args:
        rate: Requests per second.
        burst: The reserve.
        clock: Monotonic time in seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # reserve and when it was computed
        self._lock = threading.Lock()

    def take(self, address: str) -> bool:
        """Take one request from the allowance of an address; False if it has none left."""
        with self._lock:
            now = self._clock()
            left, then = self._left.pop(address, (self._burst, now))
            left = min(self._burst, left + (now - then) * self._rate)
            self._left[address] = (max(0.0, left - 1), now)
            while len(self._left) > MAX_ADDRESSES:
                self._left.popitem(last=False)
            return left >= 1


class Guard:
    """ASGI middleware that passes on only requests of this package's page by someone who knows the token.

    The token is given once in the URL (``?token=…``), and then kept in a cookie that scripts cannot read and that the
    browser does not send from other sites.

    Args:
        app: The application.
        token: The token.
        hosts: Names of this host that requests may be for, so that another site cannot resolve its own name to this
            computer; None for any.
        writable: Allow POST.
    """

    def __init__(self, app: Any, token: str, hosts: tuple[str, ...] | None, writable: bool = False) -> None:
        self._app, self._token, self._hosts = app, token, hosts
        self._methods = ("GET", "HEAD", *(("POST",) if writable else ()))
        self._requests, self._failures = Allowance(RATE, BURST), Allowance(1.0, WRONG_TOKENS)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # uvicorn refuses the WebSocket
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused:
            return await _answer(send, *refused)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        known = self._is_token(given)
        if not known and not self._is_token(_cookie(headers.get("cookie", ""))):
            if not self._failures.take(_address(scope)):
                return await _answer(send, 429, "too many attempts without the token; wait a minute")
            return await _answer(send, 403, "open the address with the token that `dino view` printed")
        return await self._app(scope, receive, self._with_headers(send, known))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self._hosts is not None and host not in self._hosts:
            return 421, f"expected a request for {' or '.join(self._hosts)}"
        if not self._requests.take(_address(scope)):
            return 429, "too many requests"
        if scope["method"] not in self._methods:
            return 405, f"expected {' or '.join(self._methods)}"
        return self._refused_content(scope, headers)

    def _refused_content(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        length, longest = headers.get("content-length", "0"), MAX_BODY if scope["method"] == "POST" else 0
        if len(scope["query_string"]) > MAX_QUERY:
            return 414, f"expected at most {MAX_QUERY} characters after the question mark"
        # A page of another site can send a POST, though not read the answer: a cookie alone does not allow it.
        origin = headers.get("origin")  # which browsers state; behind a proxy its scheme may be another one
        if scope["method"] == "POST" and origin and origin.partition("//")[2] != headers.get("host"):
            return 403, "expected a request of the viewer's own page, found one of another page"
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0] != "application/json":
            return 415, "expected JSON"
        if "transfer-encoding" in headers or not length.isdecimal() or int(length[:12]) > longest:
            return 413, f"expected a request of at most {longest} bytes"
        return None

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())

    def _with_headers(self, send: Any, set_cookie: bool) -> Any:
        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in present]
                if set_cookie:
                    cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    added.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        return send_with_headers


def _address(scope: Scope) -> str:
    return (scope.get("client") or ("",))[0]


def _cookie(header: str) -> str:
    try:
        cookie = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    headers.append((b"content-type", b"text/plain; charset=utf-8"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": (text + "\n").encode()})
