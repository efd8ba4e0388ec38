from __future__ import annotations

import csv
import io
import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import itsdangerous
import pytest

from reward_server.human.rules import Rules, Scale
from reward_server.human.store import StoreUnavailable
from reward_server.human.web.app import make_app
from reward_server.results import Scored
from tests.reward_server.human.site import SECRET, Site, Visitor, sample

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
POSTS = ["/tickets/1/rating", "/tickets/1/skip", "/undo", "/sign-out"]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = await Site.open(tmp_path, Rules())
    yield site
    await site.store.close()


async def _signed_in(site: Site, name: str = "ann", *, is_admin: bool = False, **settings: Any) -> Visitor:
    visitor = Visitor(site.app(**settings))
    await visitor.sign_in(await site.rater(name, is_admin=is_admin))
    return visitor


# Signing in


async def test_a_token_opens_the_page(site: Site) -> None:
    visitor = Visitor(site.app())
    response = await visitor.sign_in(await site.rater("ann"))
    assert (response.status_code, response.headers["location"]) == (303, "/")
    assert "Nothing to rate now" in visitor.page


async def test_a_refused_token_is_not_told_why(site: Site) -> None:
    former = await site.rater("former")
    await site.store.remove_rater("former")
    answers = []
    for token in ("never-was-one", former):
        visitor = Visitor(site.app())
        response = await visitor.sign_in(token)
        answers.append((response.status_code, response.text.replace(visitor.csrf, "")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 403
    assert "That token was not accepted." in answers[0][1]


@pytest.mark.parametrize("path", ["/", "/next", "/admin", "/admin/export.jsonl", "/admin/export.csv"])
async def test_a_page_sends_who_is_not_signed_in_to_sign_in(site: Site, path: str) -> None:
    response = await Visitor(site.app()).get(path)
    assert (response.status_code, response.headers["location"]) == (303, "/sign-in")


@pytest.mark.parametrize("path", POSTS)
async def test_a_form_of_nobody_does_nothing(site: Site, path: str) -> None:
    response = await Visitor(site.app()).post(path, {"value": "4"})
    assert (response.status_code, response.headers["location"]) == (303, "/sign-in")


async def test_in_the_background_who_is_not_signed_in_is_sent_there_as_a_whole_page(site: Site) -> None:
    response = await Visitor(site.app()).post("/undo", HX_Request="true")
    assert (response.status_code, response.headers["hx-redirect"]) == (401, "/sign-in")


async def test_signing_out_ends_the_session(site: Site) -> None:
    visitor = await _signed_in(site)
    assert (await visitor.post("/sign-out")).headers["location"] == "/sign-in"
    assert (await visitor.get("/")).headers["location"] == "/sign-in"


async def test_a_rater_who_was_removed_is_out_at_once_and_told(site: Site) -> None:
    visitor = await _signed_in(site)
    await site.store.remove_rater("ann")
    assert (await visitor.get("/")).headers["location"] == "/sign-in"
    assert "You were signed out." in (await visitor.get("/sign-in")).text


async def test_a_restart_signs_nobody_out(site: Site) -> None:
    visitor = await _signed_in(site)
    after = Visitor(site.app())
    after.client.cookies = visitor.client.cookies
    assert (await after.get("/")).status_code == 200


class _Signer(itsdangerous.TimestampSigner):
    """Signs as if it were another time."""

    def __init__(self, secret: str, at: float) -> None:
        super().__init__(secret)
        self._at = int(at)

    def get_timestamp(self) -> int:
        return self._at


@pytest.mark.parametrize(
    ("secret", "age_hours", "status"),
    [(SECRET, 11, 200), (SECRET, 13, 303), (b"another key of the same size...", 0, 303)],
)
async def test_a_session_ends_after_twelve_hours_and_cannot_be_forged(
    site: Site, secret: bytes, age_hours: float, status: int
) -> None:
    rater = await site.store.rater_by_token(await site.rater("ann"))
    assert rater is not None
    content = b64encode(json.dumps({"rater": rater.id, "credential": rater.credential}).encode())
    cookie = _Signer(secret.hex(), time.time() - age_hours * 3600).sign(content).decode()
    visitor = Visitor(site.app())
    visitor.client.cookies.set("rater", cookie)
    assert (await visitor.get("/")).status_code == status


async def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(site: Site) -> None:
    response = await Visitor(site.app()).get("/sign-in")
    cookie = response.headers["set-cookie"].lower()
    assert cookie.startswith("rater=")
    assert {"httponly", "samesite=strict", "path=/", "max-age=43200"} <= set(cookie.split("; "))
    assert "secure" not in cookie
    assert "strict-transport-security" not in response.headers


async def test_behind_https_the_cookie_travels_nowhere_else(site: Site) -> None:
    response = await Visitor(site.app(secure_cookies=True), scheme="https").get("/sign-in")
    cookie = response.headers["set-cookie"]
    assert cookie.startswith("__Host-rater=")
    assert "secure" in cookie.split("; ")
    assert response.headers["strict-transport-security"] == "max-age=31536000"


async def test_a_link_on_another_site_signs_nobody_out(site: Site) -> None:
    # The browser holds a SameSite=Strict cookie back; the page that loads itself again must leave it as it is.
    visitor = Visitor(site.app())
    for path in ("/", "/admin", "/sign-in"):
        response = await visitor.get(path, Sec_Fetch_Site="cross-site")
        assert response.status_code == 200
        assert '<meta http-equiv="refresh" content="0">' in response.text
        assert "set-cookie" not in response.headers


# Rating


async def test_a_rating_is_stored_and_the_next_completion_shown(site: Site) -> None:
    await site.ask(sample("a"), sample("b"))
    visitor = await _signed_in(site)
    assert "completion a" in visitor.page
    response = await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "4"})
    assert (response.status_code, response.headers["location"]) == (303, "/")
    shown = (await visitor.get("/")).text
    assert "completion b" in shown
    assert "Rated 4." in shown
    assert await site.ratings() == [("a", "ann", 4.0)]
    assert (await site.ask(sample("a")))[0] == Scored(0.5, {"rating": 4.0, "ratings": 1.0, "spread": 0.0})


async def test_in_the_background_a_rating_is_answered_with_the_next_completion(site: Site) -> None:
    await site.ask(sample("a"), sample("b"))
    visitor = await _signed_in(site)
    response = await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "1"}, HX_Request="true")
    assert response.status_code == 200
    assert "completion b" in response.text
    assert "Rated 1." in response.text
    assert "Rated 1." not in (await visitor.get("/")).text


async def test_a_skip_is_stored(site: Site) -> None:
    await site.ask(sample("a"))
    visitor = await _signed_in(site)
    await visitor.post(f"/tickets/{visitor.ticket}/skip")
    assert "Skipped." in (await visitor.get("/")).text
    assert await site.ratings() == [("a", "ann", None)]


async def test_the_page_loaded_again_shows_the_same_completion(site: Site) -> None:
    await site.ask(sample("a"), sample("b"))
    visitor = await _signed_in(site)
    first = visitor.ticket
    await visitor.get("/")
    assert visitor.ticket == first


async def test_undo_shows_the_last_completion_again(site: Site) -> None:
    await site.ask(sample("a"), sample("b"))
    visitor = await _signed_in(site)
    first = visitor.ticket
    await visitor.post(f"/tickets/{first}/rating", {"value": "4"}, HX_Request="true")
    await visitor.post("/undo", HX_Request="true")
    assert visitor.ticket == first
    assert "Undone." in visitor.page
    assert await site.ratings() == []


async def test_there_is_nothing_to_undo_before_the_first_rating(site: Site) -> None:
    visitor = await _signed_in(site)
    response = await visitor.post("/undo")
    assert response.status_code == 409
    assert "Nothing to undo" in response.text


async def test_a_rating_that_a_trainer_was_told_cannot_be_undone(site: Site) -> None:
    await site.ask(sample("a"))
    visitor = await _signed_in(site)
    await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "4"}, HX_Request="true")
    await site.ask(sample("a"))
    assert (await visitor.post("/undo")).status_code == 409
    assert await site.ratings() == [("a", "ann", 4.0)]


@pytest.mark.parametrize("action", ["rating", "skip"])
async def test_a_completion_that_is_somebody_elses_by_now_is_refused_and_the_next_shown(
    site: Site, action: str
) -> None:
    await site.ask(sample("a"), sample("b"), sample("c"))
    slow = await _signed_in(site, "slow")
    late = slow.ticket
    site.clock.pass_by(site.rules.lease_seconds + 1)
    quick = await _signed_in(site, "quick")
    assert quick.ticket == late
    response = await slow.post(f"/tickets/{late}/{action}", {"value": "1"})
    assert response.status_code == 409
    assert "no longer yours" in response.text
    assert slow.ticket != late
    assert await site.ratings() == []


async def test_a_completion_that_there_never_was_is_refused(site: Site) -> None:
    visitor = await _signed_in(site)
    assert (await visitor.post("/tickets/77/rating", {"value": "1"})).status_code == 409


@pytest.mark.parametrize("value", ["6", "0", "4.5", "nan", "inf", "four", ""])
async def test_a_value_off_the_scale_is_refused_and_the_completion_stays(site: Site, value: str) -> None:
    await site.ask(sample("a"))
    visitor = await _signed_in(site)
    response = await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": value})
    assert response.status_code == 422
    assert "not on the scale" in response.text
    assert "completion a" in response.text
    assert await site.ratings() == []


async def test_who_waits_is_told_nothing_until_there_is_a_completion(site: Site) -> None:
    visitor = await _signed_in(site)
    response = await visitor.get("/next", HX_Request="true")
    assert (response.status_code, response.text) == (204, "")
    await site.ask(sample("a"))
    response = await visitor.get("/next", HX_Request="true")
    assert response.status_code == 200
    assert "completion a" in response.text


async def test_named_choices_are_shown_by_their_names(tmp_path: Path) -> None:
    site = await Site.open(tmp_path, Rules(scale=Scale.of_labels({"wrong": -1, "right": 1})))
    await site.ask(sample("a"))
    visitor = await _signed_in(site)
    assert '<button name="value" value="-1.0" data-key="1"' in visitor.page
    await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "1.0"}, HX_Request="true")
    assert "Rated right." in visitor.page
    assert await site.ratings() == [("a", "ann", 1.0)]
    await site.store.close()


async def test_untrusted_text_is_never_markup(site: Site) -> None:
    evil = "</div><script>alert(1)</script><img src=x onerror=alert(1)>\" onmouseover='x'"
    turns = [{"role": evil, "content": evil, evil: evil}, {"role": "user", "content": evil}]
    await site.ask(sample("<b>id</b>", evil, evil, turns))
    visitor = await _signed_in(site)
    assert visitor.page.count("&lt;script&gt;alert(1)") == 6
    assert "<script>alert" not in visitor.page
    assert "<img" not in visitor.page
    assert "<b>id</b>" not in visitor.page


# Forms that are not of the page


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("csrf", ["", "wrong", "of another session", "é"])
async def test_a_form_without_its_sessions_token_is_refused(site: Site, path: str, csrf: str) -> None:
    await site.ask(sample("a"))
    visitor = await _signed_in(site)
    if csrf == "of another session":
        csrf = (await _signed_in(site, "bob")).csrf
    response = await visitor.post(path, {"value": "4", "csrf": csrf})
    assert response.status_code == 403
    assert await site.ratings() == []
    assert (await visitor.get("/")).status_code == 200


async def test_a_sign_in_form_without_its_token_is_refused(site: Site) -> None:
    visitor = Visitor(site.app())
    assert (await visitor.post("/sign-in", {"token": await site.rater("ann")})).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Origin": "http://page.test"}, 303),
        ({"Origin": "http://page.test"}, 303),
    ],
)
async def test_a_form_that_another_site_sent_is_refused(site: Site, headers: dict[str, str], status: int) -> None:
    await site.ask(sample("a"))
    visitor = await _signed_in(site)
    response = await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "4"}, **headers)
    assert response.status_code == status
    assert len(await site.ratings()) == (status == 303)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/undo", {"POST"}), ("PUT", "/", {"GET", "HEAD"}), ("DELETE", "/tickets/1/rating", {"POST"})],
)
async def test_a_wrong_method_is_refused_with_the_right_ones(
    site: Site, method: str, path: str, allowed: set[str]
) -> None:
    response = await Visitor(site.app()).client.request(method, path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == allowed


async def test_a_form_that_is_too_large_is_refused(site: Site) -> None:
    visitor = await _signed_in(site)
    assert (await visitor.post("/undo", {"more": "x" * 2000})).status_code == 400


# How often


def _stopped() -> float:
    return 0.0


async def test_a_rater_who_posts_too_fast_is_told_when_to_come_back(site: Site) -> None:
    visitor = await _signed_in(site, posts_per_minute=2, clock=_stopped)
    other = Visitor(visitor.client._transport.app)  # type: ignore[attr-defined]
    await other.sign_in(await site.rater("bob"))
    statuses = [(await visitor.post("/undo", {"csrf": visitor.csrf})).status_code for _ in range(3)]
    assert statuses == [409, 409, 429]
    await visitor.get("/")
    assert 0 < int((await visitor.post("/undo")).headers["retry-after"]) <= 30
    assert (await other.post("/undo")).status_code == 409


async def test_signing_in_is_tried_only_so_often_from_an_address(site: Site) -> None:
    app, token = site.app(clock=_stopped), await site.rater("ann")
    statuses = [(await Visitor(app, address="10.0.0.1").sign_in("guess")).status_code for _ in range(10)]
    assert statuses == [403] * 10
    response = await Visitor(app, address="10.0.0.1").sign_in(token)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) > 0
    assert (await Visitor(app, address="10.0.0.2").sign_in(token)).status_code == 303


async def test_signing_in_is_tried_only_so_often_in_all(site: Site) -> None:
    app = site.app(clock=_stopped)
    visitor = Visitor(app)
    await visitor.get("/sign-in")
    form = {"csrf": visitor.csrf, "token": "guess"}
    statuses = []
    for number in range(301):
        transport = httpx.ASGITransport(app, client=(f"10.0.{number // 250}.{number % 250}", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://page.test") as client:
            client.cookies = visitor.client.cookies
            statuses.append((await client.post("/sign-in", data=form)).status_code)
    assert statuses == [403] * 300 + [429]


# What goes wrong


class _Down:
    """A database that is away."""

    def __getattr__(self, name: str) -> Any:
        async def fail(*_: object) -> None:
            raise StoreUnavailable("the database is away")

        return fail


class _Broken:
    """A store with a fault."""

    def __getattr__(self, name: str) -> Any:
        async def fail(*_: object) -> None:
            raise ZeroDivisionError

        return fail


def _app_over(store: Any) -> Any:
    return make_app(
        store, Rules(), title="t", question="q", instructions="", secret=SECRET, secure_cookies=True, posts_per_minute=9
    )


async def test_while_the_database_is_away_it_is_said_when_to_come_back() -> None:
    visitor = Visitor(_app_over(_Down()), scheme="https")
    response = await visitor.sign_in("token")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert "may not be stored" in response.text


async def test_a_fault_is_answered_without_its_details_and_with_all_headers() -> None:
    visitor = Visitor(_app_over(_Broken()), scheme="https")
    response = await visitor.sign_in("token")
    assert response.status_code == 500
    assert "ZeroDivision" not in response.text
    assert {name: response.headers.get(name) for name in HEADERS} == HEADERS
    assert response.headers["strict-transport-security"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/sign-in", 200),
        ("/next", 204),
        ("/admin", 200),
        ("/admin/export.jsonl", 200),
        ("/admin/export.csv", 200),
        ("/healthz", 200),
        ("/static/page.css", 200),
        ("/static/vendor/htmx-4.0.1.min.js", 200),
        ("/static/none.js", 404),
        ("/static/../app.py", 404),
        ("/none", 404),
        ("/undo", 405),
    ],
)
async def test_every_answer_has_the_security_headers(site: Site, path: str, status: int) -> None:
    visitor = await _signed_in(site, is_admin=True)
    response = await visitor.get(path)
    assert response.status_code == status
    assert {name: response.headers.get(name) for name in HEADERS} == HEADERS
    assert response.headers["cache-control"] == ("no-cache" if status == 200 and "static" in path else "no-store")


async def test_redirects_and_refusals_have_the_security_headers(site: Site) -> None:
    visitor = Visitor(site.app())
    for response in (await visitor.get("/"), await visitor.post("/sign-in", {"token": "guess"})):
        assert {name: response.headers.get(name) for name in HEADERS} == HEADERS


# For administrators


@pytest.mark.parametrize("path", ["/admin", "/admin/export.jsonl", "/admin/export.csv"])
async def test_the_overview_is_for_administrators_only(site: Site, path: str) -> None:
    response = await (await _signed_in(site)).get(path)
    assert response.status_code == 403
    assert "for administrators" in response.text


async def test_the_overview_counts_the_queue(site: Site) -> None:
    await site.ask(sample("a"), sample("b"), sample("c"))
    site.clock.pass_by(4200)
    visitor = await _signed_in(site, is_admin=True)
    await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "4"}, HX_Request="true")
    page = (await visitor.get("/admin")).text
    assert "<dt>Waiting</dt><dd>1</dd>" in page
    assert "<dt>Being rated</dt><dd>1</dd>" in page
    assert "<dt>Done</dt><dd>1</dd>" in page
    assert "<dd>1 h 10 min</dd>" in page
    assert "<bdi>ann</bdi>" in page


async def test_ratings_are_exported_as_jsonl(site: Site) -> None:
    await site.ask(sample("a", '=1+1 "quoted"\nline', "prompt"))
    visitor = await _signed_in(site, is_admin=True)
    await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "4"})
    response = await visitor.get("/admin/export.jsonl")
    assert response.headers["content-disposition"] == 'attachment; filename="ratings.jsonl"'
    [row] = [json.loads(line) for line in response.text.splitlines()]
    assert (row["run_id"], row["sample_id"], row["rater"], row["value"]) == ("run", "a", "ann", 4.0)
    assert (row["prompt"], row["completion"], row["reward"]) == ("prompt", '=1+1 "quoted"\nline', 0.5)


async def test_no_cell_of_the_csv_export_is_a_formula(site: Site) -> None:
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]
    await site.ask(*(sample(str(number), formula) for number, formula in enumerate(formulas)))
    visitor = await _signed_in(site, is_admin=True)
    for _ in formulas:
        await visitor.post(f"/tickets/{visitor.ticket}/rating", {"value": "4"}, HX_Request="true")
    response = await visitor.get("/admin/export.csv")
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(response.text, newline="")))
    assert [row["completion"] for row in rows] == [f"'{formula}" for formula in formulas]
    assert [row["value"] for row in rows] == ["4.0"] * len(formulas)


async def test_an_export_of_nothing_is_a_header_alone(site: Site) -> None:
    visitor = await _signed_in(site, is_admin=True)
    assert (await visitor.get("/admin/export.jsonl")).text == ""
    assert (await visitor.get("/admin/export.csv")).text.startswith("version,run_id,sample_id,")
