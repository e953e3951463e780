"""Who may come in: checks on every request before any handler sees it, and headers on every answer.

    Host      on loopback, a page of some other site that points its own name at 127.0.0.1 (DNS rebinding) is refused
    Origin    a browser on another site's page is refused; there is no CORS
    key       with --api-key, everything but the page itself and /health needs `Authorization: Bearer KEY`
    body      read up to `MAX_BODY_BYTES`, no further, and for `BODY_S` seconds, no longer (`patience.py`: the head)

The gate is plain ASGI around the application: it adds nothing to the path of a streamed answer.
"""

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from puna.serve.fields import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 4 << 20
BODY_S = 60.0
OPEN_PATHS = ("/", "/health")
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


def is_loopback(host: str) -> bool:
    """Whether a server bound to `host` is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """The application behind its checks. `answer_error(error, scope, receive, send)` writes a refusal."""

    def __init__(self, app: Any, *, host: str, api_key: str | None, answer_error: Callable[..., Awaitable[None]]):
        self.app, self.host, self.answer_error = app, host, answer_error
        self.key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            return await self.answer_error(error, scope, receive, send_guarded)
        await self.app(scope, receive, send_guarded)

    def check(self, scope: Scope) -> None:
        """Raises `ApiError` for a request that may not come in."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if is_loopback(self.host) and not is_local_name(host, self.host):
            raise ApiError(403, f"the Host header {host!r} does not name this machine", code="bad_host")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(403, f"requests from pages of {origin!r} are not accepted", code="bad_origin")
        if self.key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get(b"authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode("latin-1"), self.key)
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "this server needs an API key: send Authorization: Bearer KEY",
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


def is_local_name(header: str, bound: str) -> bool:
    """Whether a Host header names the loopback interface, or is the name that the server was bound to."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    return name == bound or is_loopback(name)


async def read_body(receive: Receive) -> bytes:
    """The whole request body. Raises `ApiError`: 413 as soon as it is too long, 408 if it does not come to its end."""
    try:
        async with asyncio.timeout(BODY_S):
            return await _whole(receive)
    except TimeoutError:
        late = {"Connection": "close"}
        raise ApiError(408, f"the body did not come in {BODY_S:g} s", code="body_too_slow", headers=late) from None


async def _whole(receive: Receive) -> bytes:
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(499, "the client went away")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES:,} bytes", code="body_too_large")
        more = message.get("more_body", False)
    return b"".join(chunks)
