"""The rating page over a real store, for tests: samples, raters, and a client that fills in forms as a browser does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from reward_server.human.rules import Rules
from reward_server.human.store import Store
from reward_server.human.web.app import make_app
from reward_server.kinds import Sample
from reward_server.results import Outcome
from tests.reward_server.human.conftest import Clock, make_sample

SECRET = b"the key that signs the sessions."
_CSRF = re.compile(r'name="csrf" value="([^"]+)"')
_TICKET = re.compile(r"/tickets/(\d+)/rating")


def sample(
    id: str, completion: str = "", prompt: str = "Tell me.", messages: Sequence[Mapping[str, Any]] = ()
) -> Sample:
    return make_sample(id, completion or f"completion {id}", prompt=prompt, messages=messages)


class Site:
    """A store in a folder, the application over it, and what is needed to use both.

    `Clock` is only the store's: sessions have the real time.
    """

    def __init__(self, store: Store, rules: Rules, clock: Clock) -> None:
        self.store = store
        self.rules = rules
        self.clock = clock

    @classmethod
    async def open(cls, folder: Path, rules: Rules) -> Site:
        clock = Clock()
        return cls(await Store.open(f"sqlite:///{folder / 'ratings.db'}", rules, clock), rules, clock)

    def app(self, **settings: Any) -> Starlette:
        defaults: dict[str, Any] = {
            "title": "Film reviews",
            "question": "How good is the completion?",
            "instructions": "Spelling counts, length does not.",
            "secret": SECRET,
            "secure_cookies": False,
        }
        return make_app(self.store, self.rules, **{**defaults, **settings})

    async def ask(self, *samples: Sample) -> list[Outcome]:
        """What a trainer is answered about samples, which have tickets from then on."""
        return await self.store.outcomes(samples)

    async def rater(self, name: str, *, is_admin: bool = False) -> str:
        """A new rater's token."""
        return await self.store.add_rater(name, is_admin=is_admin)

    async def ratings(self) -> list[tuple[str, str, float | None]]:
        """(sample_id, rater, value) of all that was stored."""
        return [(row.sample_id, row.rater, row.value) async for row in self.store.export()]


class Visitor:
    """A browser without JavaScript: keeps cookies, and sends with each form the token of the page it was on."""

    def __init__(self, app: Starlette, *, address: str = "127.0.0.1", scheme: str = "http") -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(address, 1))
        self.client = httpx.AsyncClient(transport=transport, base_url=f"{scheme}://page.test")
        self.page = ""

    async def get(self, path: str, **headers: str) -> httpx.Response:
        response = await self.client.get(path, headers=_names(headers))
        self.page = response.text or self.page
        return response

    async def post(self, path: str, form: Mapping[str, str] | None = None, **headers: str) -> httpx.Response:
        """Not followed where it redirects. csrf in the form = that one; "" = none."""
        fields = {"csrf": self.csrf, **(form or {})}
        sent = {name: value for name, value in fields.items() if value}
        response = await self.client.post(path, data=sent, headers=_names(headers))
        self.page = response.text or self.page
        return response

    async def sign_in(self, token: str) -> httpx.Response:
        await self.get("/sign-in")
        response = await self.post("/sign-in", {"token": token})
        if response.is_redirect:
            await self.get("/")
        return response

    @property
    def csrf(self) -> str:
        found = _CSRF.search(self.page)
        return found[1] if found else ""

    @property
    def ticket(self) -> int:
        """The ticket that the page shows."""
        found = _TICKET.search(self.page)
        assert found is not None, self.page
        return int(found[1])


def _names(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}
