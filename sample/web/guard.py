"""What a request must be before anything reads it: from here, by whom, and how large."""

import base64
import binascii
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOCAL = ("127.0.0.1", "localhost", "[::1]")
CLOSED = ("/gradio_api/proxy", "/gradio_api/stream", "/gradio_api/deep_link", "/monitoring")
"""Beginnings of paths of gradio that the page does not need: they fetch, or tell of others."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:;"
        b" style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval';"
        b" font-src 'self' data:; worker-src 'self' blob:; connect-src 'self';"
        b" frame-ancestors 'none'; base-uri 'self'; form-action 'self'; object-src 'none'",
    ),
)


class Guard:
    """An ASGI application before another one.

    auth: USER:PASSWORD that every request must give by HTTP Basic; None asks for none, and then
        only names of this machine are taken as Host.
    A page of another site cannot ask anything in a visitor's name: its Origin is refused.
    """

    def __init__(self, app: Any, *, auth: str | None, most: int) -> None:
        self.app, self.auth, self.most = app, auth, most

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass on what is allowed; answer 400, 401, 403, 404 or 413 to the rest."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"content-length") and name in headers:
                await _answer(send, 400, "a header is given twice")
                return
            headers[name] = value
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        started, read = False, 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:  # to what reads it, the client has gone
                return {"type": "http.disconnect"}
            return message

        async def dressed(message: Message) -> None:
            nonlocal started
            if read > self.most and not started:
                return
            if message["type"] == "http.response.start":
                started = True
                own = {name for name, _ in HEADERS}
                kept = [(n, v) for n, v in message.get("headers", []) if n.lower() not in own]
                message = {**message, "headers": [*kept, *HEADERS]}
            await send(message)

        try:
            await self.app(scope, counted, dressed)
        except Exception:
            if started or read <= self.most:
                raise
        if read > self.most and not started:
            await _answer(send, 413, self._too_large())

    def _refusal(
        self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]
    ) -> tuple[int, str] | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.auth is None and name not in LOCAL:
            return 403, f"Host {host!r:.100} is not one of {', '.join(LOCAL)}"
        origin = headers.get(b"origin")
        if origin is not None:
            parts = urlsplit(origin.decode("latin-1").lower())
            if parts.netloc != host:
                return 403, f"Origin {origin.decode('latin-1')!r:.100} is not this server"
        if headers.get(b"sec-fetch-site") == b"cross-site" and scope["method"] != "GET":
            return 403, "the request comes from another site"
        if self.auth is not None and not _knows(headers.get(b"authorization", b""), self.auth):
            return 401, "give user and password (HTTP Basic)"
        if scope["path"].startswith(CLOSED):
            return 404, "Not Found"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "Content-Length is no number"
        if int(length) > self.most:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the request has more than {self.most:,} bytes"


class NoAddresses:
    """An ASGI application before the page's: refuses files of a request that are addresses.

    gradio would fetch them. The bodies that it looks at are small: files are uploaded before.
    """

    def __init__(self, app: Any, *, below: str, most: int = 2**20) -> None:
        self.app, self.below, self.most = app, below, most

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass on what holds none; answer 413 or 422 to the rest."""
        looks = scope["type"] == "http" and scope["method"] == "POST"
        kind = dict(scope.get("headers", ())).get(b"content-type", b"")
        if not looks or not scope["path"].startswith(self.below) or kind.startswith(b"multipart/"):
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.most:
                await _answer(send, 413, f"the request has more than {self.most:,} bytes")
                return
        try:
            held = _addresses(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            held = True
        if held:
            await _answer(send, 422, "a file is an address, and none is fetched: send the file")
            return
        whole: Message = {"type": "http.request", "body": body, "more_body": False}

        async def again() -> Message:
            nonlocal whole
            message, whole = whole, {}
            return message or await receive()

        await self.app(scope, again, send)


def _addresses(value: Any) -> bool:
    """True if a `path` in JSON is an address."""
    if isinstance(value, list):
        return any(map(_addresses, value))
    if not isinstance(value, dict):
        return False
    path = value.get("path")
    return (isinstance(path, str) and ":/" in path) or any(map(_addresses, value.values()))


def _knows(given: bytes, wanted: str) -> bool:
    scheme, _, token = given.partition(b" ")
    try:
        told = base64.b64decode(token.strip(), validate=True)
    except (binascii.Error, ValueError):
        return False
    return scheme.lower() == b"basic" and secrets.compare_digest(told, wanted.encode())


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="ldm-web", charset="UTF-8"'))
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
