"""Who is asking: a random cookie, so that a visitor's edits find their way back to him and to nobody else.

The cookie is set with the page itself, before the page's socket is opened, and is no secret of anybody else: 256 random
bits, not readable by scripts, sent to this server alone. It holds no data. An answer that sets it is whole and may be
stored nowhere: a proxy that kept it would hand one visitor's cookie to the next. Without cookies (or in a test without
a browser) a session is a visitor of its own, until it ends.
"""

from __future__ import annotations

import re
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Any

import streamlit as st

COOKIE = "factscope-visitor"
_VALUE = re.compile(r"[A-Za-z0-9_-]{43}")
_SECONDS = 30 * 24 * 3600
_OWN = "visitor-without-cookie"
_IF_CHANGED = (b"if-none-match", b"if-modified-since")


class VisitorCookie:
    """ASGI middleware: gives a browser that asks for a page its cookie, if it has none.

    Args:
        app: what answers.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass everything on; add the cookie to the answer's head if it is a page."""
        if scope["type"] != "http" or scope["method"] != "GET" or _of(scope) is not None:
            await self._app(scope, receive, send)
            return

        async def with_cookie(message: Any) -> None:
            if message["type"] == "http.response.start" and _is_page(message):
                secure = "; Secure" if scope.get("scheme") == "https" else ""
                others = [(name, one) for name, one in message["headers"] if name.lower() != b"cache-control"]
                value = f"{COOKIE}={secrets.token_urlsafe(32)}; Path=/; Max-Age={_SECONDS}; HttpOnly; SameSite=Lax"
                cookie = (b"set-cookie", f"{value}{secure}".encode())
                message = {**message, "headers": [*others, (b"cache-control", b"no-store"), cookie]}
            await send(message)

        # A page that the browser still has would come back as "not modified", and without a cookie.
        asked = [(name, value) for name, value in scope["headers"] if name.lower() not in _IF_CHANGED]
        await self._app({**scope, "headers": asked}, receive, with_cookie)


def _of(scope: Any) -> str | None:
    for name, value in scope["headers"]:
        if name.lower() == b"cookie":
            try:
                found = SimpleCookie(value.decode("latin-1")).get(COOKIE)
            except CookieError:
                return None
            return found.value if found is not None and _VALUE.fullmatch(found.value) else None
    return None


def _is_page(message: Any) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in message["headers"])


def name() -> str:
    """This session's visitor."""
    found = st.context.cookies.get(COOKIE)
    if isinstance(found, str) and _VALUE.fullmatch(found):
        return found
    if _OWN not in st.session_state:
        st.session_state[_OWN] = secrets.token_urlsafe(32)
    return st.session_state[_OWN]
