# SPDX-License-Identifier: Apache-2.0
"""Who is let through to the page: an ASGI application before another one.

On the loopback address everybody is who names this machine and comes from no other site's page. On any other
address one must have the token, which the address that the command prints holds. A cookie keeps it from then
on.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "cogview-token"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses requests before ``application`` sees them.

    Args:
        token: what visitors must show; None, for the loopback address, where there is none.
        largest: bytes that a visitor may send at a time.
    """

    def __init__(self, application: Application, token: str | None, largest: int) -> None:
        self.application, self.token, self.largest = application, token, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.application(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status, line = self._refusal(scope, headers)
        if status is not None:
            await _refuse(scope, send, status, line)
        elif self._shows_token_in_address(scope):
            await _keep_token(scope, send, str(self.token))
        else:
            await self.application(scope, _Counted(receive, self.largest), send)

    def _refusal(self, scope: Scope, headers: MutableMapping[str, str]) -> tuple[HTTPStatus | None, str]:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token is None and not is_loopback(_host_name(host)):
            # A name of another site that was made to lead here.
            return HTTPStatus.FORBIDDEN, "this page is for this machine alone"
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return HTTPStatus.FORBIDDEN, "another site may not use this page"
        if self.token is not None and not (
            self._is_token(_cookie(headers)) or self._shows_token_in_address(scope)
        ):
            return (
                HTTPStatus.FORBIDDEN,
                "open the whole address that cogview serve has printed, token included",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.largest:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {self.largest >> 20} MiB are refused"
        return None, ""

    def _is_token(self, shown: str) -> bool:
        return self.token is not None and hmac.compare_digest(shown.encode(), self.token.encode())

    def _shows_token_in_address(self, scope: Scope) -> bool:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        return scope["type"] == "http" and self._is_token(query.get("token", [""])[0])


class _Counted:
    """What a visitor sends, up to a number of bytes: not every request says beforehand how many will come."""

    def __init__(self, receive: Receive, largest: int) -> None:
        self.receive, self.left = receive, largest

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self.receive()
        if message["type"] == "http.request":
            self.left -= len(message.get("body", b""))
            if self.left < 0:
                return {"type": "http.disconnect"}
        return message


def _host_name(host: str) -> str:
    """A host without its port; empty for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(headers: MutableMapping[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found is not None else ""


async def _refuse(scope: Scope, send: Send, status: HTTPStatus, line: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": line})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": line.encode() + b"\n"})


async def _keep_token(scope: Scope, send: Send, token: str) -> None:
    """To the same page without the token, which a cookie keeps, so that no bookmark or referrer holds it."""
    cookie = f"{COOKIE}={token}; Path=/; HttpOnly; SameSite=Lax"
    headers = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": int(HTTPStatus.SEE_OTHER), "headers": headers})
    await send({"type": "http.response.body", "body": b""})
