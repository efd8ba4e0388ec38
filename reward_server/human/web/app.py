"""The web application of the human reward: sign in, rate one completion after another, and see how it goes.

Every page works as plain forms and redirects. With htmx the same forms are posted in the background, and the answer's
`#main` takes the place of the page's: there is one kind of answer, with or without JavaScript.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import Scope

from reward_server.human.export import CSV_HEADER, csv_line, jsonl_line
from reward_server.human.rules import Choice, Rules
from reward_server.human.store import Store, StoreUnavailable
from reward_server.human.tickets import ExportRow, Rated, Rater
from reward_server.human.web.keys import rating_keys
from reward_server.human.web.ratelimit import RateLimit
from reward_server.human.web.security import (
    SecurityHeaders,
    add_security_headers,
    csrf_token,
    from_another_site,
    require_own_form,
)
from reward_server.human.web.text import prompt_turns, visible

_HERE = Path(__file__).parent
_SESSION_SECONDS = 12 * 3600
_SIGN_INS_PER_ADDRESS = 10
_SIGN_INS_IN_ALL = 300
_UNAVAILABLE_SECONDS = 5


def make_app(
    store: Store,
    rules: Rules,
    *,
    title: str,
    question: str,
    instructions: str,
    secret: bytes,
    secure_cookies: bool,
    posts_per_minute: int = 600,
    clock: Callable[[], float] = time.monotonic,
) -> Starlette:
    """The application.

    title, question, instructions: what raters are asked, as plain text. secret: signs sessions; replicas share it.
    secure_cookies: the browser sees https, so that it sends cookies over nothing else. posts_per_minute: of one rater,
    by `clock`, in seconds.
    """
    limits = _Limits(
        posts=RateLimit(posts_per_minute, clock),
        sign_ins=RateLimit(_SIGN_INS_PER_ADDRESS, clock),
        all_sign_ins=RateLimit(_SIGN_INS_IN_ALL, clock),
    )
    pages = _Pages(store, rules, _environment(rules, title, question, instructions), limits, https=secure_cookies)
    return Starlette(
        routes=[
            Route("/", pages.rating_page),
            Route("/next", pages.next_page),
            Route("/sign-in", pages.sign_in_page),
            Route("/sign-in", pages.sign_in, methods=["POST"]),
            Route("/sign-out", pages.sign_out, methods=["POST"]),
            Route("/tickets/{ticket:int}/rating", pages.rate, methods=["POST"]),
            Route("/tickets/{ticket:int}/skip", pages.skip, methods=["POST"]),
            Route("/undo", pages.undo, methods=["POST"]),
            Route("/admin", pages.admin_page),
            Route("/admin/export.jsonl", pages.export_jsonl),
            Route("/admin/export.csv", pages.export_csv),
            Route("/healthz", _healthz),
            Mount("/static", _Static(directory=_HERE / "static")),
        ],
        middleware=[
            Middleware(SecurityHeaders, https=secure_cookies),
            Middleware(
                SessionMiddleware,
                secret_key=secret.hex(),
                # The prefix makes browsers refuse a cookie of this name that another host or plain http has set.
                session_cookie="__Host-rater" if secure_cookies else "rater",
                max_age=_SESSION_SECONDS,
                same_site="strict",
                https_only=secure_cookies,
            ),
        ],
        exception_handlers={
            _SignedOut: pages.on_signed_out,
            HTTPException: pages.on_refusal,
            StoreUnavailable: pages.on_store_unavailable,
            Exception: pages.on_fault,
        },
    )


class _SignedOut(Exception):  # noqa: N818 - not a mistake
    """Nobody is signed in: never was, the session ran out, or the rater was removed."""


class _Static(StaticFiles):
    """Files that a browser keeps, and asks each time whether they are still the same."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


@dataclass(frozen=True)
class _Limits:
    posts: RateLimit
    sign_ins: RateLimit
    all_sign_ins: RateLimit


def _environment(rules: Rules, title: str, question: str, instructions: str) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["visible"] = visible
    environment.filters["span"] = _span
    environment.globals.update(
        site=title,
        question=question,
        instructions=instructions,
        buttons=list(zip(rules.scale.choices, rating_keys(rules.scale), strict=True)),
    )
    return environment


class _Pages:
    def __init__(self, store: Store, rules: Rules, environment: Environment, limits: _Limits, *, https: bool) -> None:
        self._store = store
        self._rules = rules
        self._templates = Jinja2Templates(env=environment)
        self._limits = limits
        self._https = https

    # Signing in and out

    async def sign_in_page(self, request: Request) -> Response:
        if from_another_site(request):
            return self._again(request)
        return self._page(request, "sign_in.html", notice=_take_notice(request))

    async def sign_in(self, request: Request) -> Response:
        form = await request.form(max_files=0, max_fields=4, max_part_size=1024)
        require_own_form(request, form)
        address = request.client.host if request.client else ""
        _within(self._limits.sign_ins, address)
        _within(self._limits.all_sign_ins, None)
        rater = await self._store.rater_by_token(str(form.get("token", "")).strip())
        if rater is None:
            return self._page(request, "sign_in.html", 403, notice="That token was not accepted.")
        request.session.clear()
        request.session.update(rater=rater.id, credential=rater.credential)
        return RedirectResponse("/", 303)

    async def sign_out(self, request: Request) -> Response:
        await self._posted(request)
        request.session.clear()
        return RedirectResponse("/sign-in", 303)

    # Rating

    async def rating_page(self, request: Request) -> Response:
        return await self._rating_page(request, await self._rater(request))

    async def next_page(self, request: Request) -> Response:
        """What the page with nothing to rate asks now and then: 204 as long as that has not changed."""
        rater = await self._rater(request)
        if await self._store.next_ticket(rater) is None:
            return Response(status_code=204)
        _give_notice(request, "There is a completion to rate.")
        return await self._rating_page(request, rater)

    async def rate(self, request: Request) -> Response:
        rater, form = await self._posted(request)
        choice = self._choice(form.get("value"))
        if choice is None:
            return await self._rating_page(request, rater, 422, "That value is not on the scale. Nothing was stored.")
        rated = await self._store.rate(rater, request.path_params["ticket"], choice.value)
        return await self._after(request, rater, rated, f"Rated {choice.label}.")

    async def skip(self, request: Request) -> Response:
        rater, _ = await self._posted(request)
        rated = await self._store.skip(rater, request.path_params["ticket"])
        return await self._after(request, rater, rated, "Skipped.")

    async def undo(self, request: Request) -> Response:
        rater, _ = await self._posted(request)
        if await self._store.undo(rater) is None:
            return await self._rating_page(
                request, rater, 409, "Nothing to undo: there is no last rating, or it is already in use."
            )
        _give_notice(request, "Undone. Rate it again.")
        return await self._back_to_rating(request, rater)

    async def _after(self, request: Request, rater: Rater, rated: Rated, notice: str) -> Response:
        if rated is not Rated.STORED:
            return await self._rating_page(
                request,
                rater,
                409,
                "That completion is no longer yours to rate: your time ran out, or it has ended. Nothing was stored.",
            )
        _give_notice(request, notice)
        return await self._back_to_rating(request, rater)

    async def _back_to_rating(self, request: Request, rater: Rater) -> Response:
        # htmx would only follow the redirect: a round trip for each rating.
        if "hx-request" in request.headers:
            return await self._rating_page(request, rater)
        return RedirectResponse("/", 303)

    async def _rating_page(self, request: Request, rater: Rater, status: int = 200, problem: str = "") -> Response:
        ticket = await self._store.next_ticket(rater)
        return self._page(
            request,
            "rate.html",
            status,
            rater=rater,
            ticket=ticket,
            turns=prompt_turns(ticket.messages_json) if ticket else [],
            pace=await self._store.pace(rater),
            notice=_take_notice(request),
            problem=problem,
        )

    def _choice(self, value: object) -> Choice | None:
        try:
            return self._rules.scale.find(float(str(value)))
        except ValueError:
            return None

    # For those who look after it

    async def admin_page(self, request: Request) -> Response:
        rater = await self._admin(request)
        return self._page(request, "admin.html", rater=rater, overview=await self._store.overview())

    async def export_jsonl(self, request: Request) -> Response:
        await self._admin(request)
        return _download(_lines(self._store.export(), jsonl_line), "application/jsonl", "ratings.jsonl")

    async def export_csv(self, request: Request) -> Response:
        await self._admin(request)
        return _download(_lines(self._store.export(), csv_line, CSV_HEADER), "text/csv", "ratings.csv")

    # Who asks

    async def _rater(self, request: Request) -> Rater:
        # Asked each time, so that a rater who was removed is out at once.
        session = request.session
        signed_in = "rater" in session
        rater = await self._store.rater_by_session(session["rater"], session["credential"]) if signed_in else None
        if rater is None:
            raise _SignedOut
        return rater

    async def _admin(self, request: Request) -> Rater:
        rater = await self._rater(request)
        if not rater.is_admin:
            raise HTTPException(403, "This page is for administrators.")
        return rater

    async def _posted(self, request: Request) -> tuple[Rater, Any]:
        rater = await self._rater(request)
        form = await request.form(max_files=0, max_fields=4, max_part_size=1024)
        require_own_form(request, form)
        _within(self._limits.posts, rater.id)
        return rater, form

    # What goes wrong

    async def on_signed_out(self, request: Request, _: Exception) -> Response:
        if from_another_site(request):
            return self._again(request)
        if "rater" in request.session:
            request.session.clear()
            _give_notice(request, "You were signed out.")
        if "hx-request" in request.headers:
            return Response(status_code=401, headers={"HX-Redirect": "/sign-in"})
        return RedirectResponse("/sign-in", 303)

    async def on_refusal(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return self._error(request, error.status_code, error.detail, error.headers)

    async def on_store_unavailable(self, request: Request, _: Exception) -> Response:
        wait = str(_UNAVAILABLE_SECONDS)
        why = "The database does not answer. Your last rating may not be stored; nothing before it is lost."
        return self._error(request, 503, why, {"Retry-After": wait})

    async def on_fault(self, request: Request, _: Exception) -> Response:
        # Answered outside of all middleware, which adds the headers elsewhere.
        response = self._error(request, 500, "Something went wrong here. Your last rating may not be stored.")
        add_security_headers(response.headers, https=self._https)
        return response

    def _again(self, request: Request) -> Response:
        # The cookie may only have been held back. Loaded again from here, the page is a request of this site.
        return self._page(request, "again.html")

    def _error(self, request: Request, status: int, why: str, headers: Mapping[str, str] | None = None) -> Response:
        return self._page(request, "error.html", status, headers, status=status, why=why)

    def _page(
        self,
        request: Request,
        template: str,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        **context: Any,
    ) -> Response:
        context = {"csrf": partial(csrf_token, request), "rater": None, "notice": "", "problem": "", **context}
        return self._templates.TemplateResponse(request, template, context, status_code, headers)


async def _healthz(_: Request) -> Response:
    return PlainTextResponse("ok")


def _span(seconds: float) -> str:
    """A span of time in its two largest units."""
    minutes, hours, days = (int(seconds // length) for length in (60, 3600, 86400))
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _within(limit: RateLimit, key: object) -> None:
    wait = limit.take(key)
    if wait:
        raise HTTPException(429, f"Too fast. Try again in {wait} s.", {"Retry-After": str(wait)})


async def _lines(
    rows: AsyncIterator[ExportRow], line: Callable[[ExportRow], str], header: str = ""
) -> AsyncIterator[str]:
    yield header
    async for row in rows:
        yield line(row)


def _download(chunks: AsyncIterator[str], media_type: str, name: str) -> Response:
    return StreamingResponse(
        chunks, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )


def _give_notice(request: Request, notice: str) -> None:
    """What the next page that the session sees says first."""
    request.session["notice"] = notice


def _take_notice(request: Request) -> str:
    return str(request.session.pop("notice", ""))
