"""What keeps a rater's session the rater's own: headers of every response, and where a form may come from."""

from __future__ import annotations

import hmac
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import FormData, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Completions are untrusted. Should one ever get out of its box, nothing that it brings along may run or load.
_CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not "no-referrer": browsers would send "Origin: null" with our own forms.
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_CSRF = "csrf"


def add_security_headers(headers: MutableHeaders, *, https: bool) -> None:
    """Give a response the headers that each of ours has; what it has already stays, its caching included."""
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    # The pages show one rater's work: neither a proxy nor the back button may show it to the next.
    headers.setdefault("Cache-Control", "no-store")
    if https:
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")


class SecurityHeaders:
    """Middleware that does it for whatever the application answers, errors and files too."""

    def __init__(self, app: ASGIApp, *, https: bool) -> None:
        self._app = app
        self._https = https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_security_headers(MutableHeaders(scope=message), https=self._https)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def csrf_token(request: Request) -> str:
    """The session's token, which every form of it carries; made when the session has none."""
    token = request.session.get(_CSRF)
    if not token:
        token = request.session[_CSRF] = secrets.token_urlsafe(32)
    return str(token)


def require_own_form(request: Request, form: FormData) -> None:
    """Refuse, with 403, a form that is not of this session, or that another site sent."""
    expected = str(request.session.get(_CSRF, ""))
    given = form.get(_CSRF)
    if not (expected and isinstance(given, str) and hmac.compare_digest(expected.encode(), given.encode())):
        raise HTTPException(403, "This form is from an older page. Go back to the start and try again.")
    if not _same_origin(request):
        raise HTTPException(403, "Another site sent this form.")


def from_another_site(request: Request) -> bool:
    """Whether a link on another site led here, so that the browser held a SameSite=Strict cookie back."""
    return request.method == "GET" and request.headers.get("sec-fetch-site") == "cross-site"


def _same_origin(request: Request) -> bool:
    # A browser sends Sec-Fetch-Site to https and localhost, Origin with every POST; other clients send neither, and
    # no browser's cookies.
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")
