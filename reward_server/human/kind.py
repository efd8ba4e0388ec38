"""The human kind: samples become tickets, people rate them on a page, and trainers ask until they have."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from reward_server import metrics
from reward_server.human.database import DatabaseUrlError
from reward_server.human.migrations import NewerDatabaseError
from reward_server.human.options import HumanOptions
from reward_server.human.page_server import PageServer
from reward_server.human.store import Store, StoreUnavailable
from reward_server.human.web.app import make_app
from reward_server.kinds import Description, Limits, RewardKind, RewardLoadError, Sample
from reward_server.results import Outcome
from rlhf import failures
from rlhf.endpoint import write_endpoint_file
from rlhf.logs import get_logger

__all__ = ["HumanOptions", "HumanReward"]

_log = get_logger(__name__)

# Outcomes are never deleted; ten years are what we dare promise of somebody else's disk.
_REMEMBERED_SECONDS = 10 * 365 * 86400.0
_CONNECT_PAUSE_SECONDS = 2.0
_OBSERVE_SECONDS = 5.0


class HumanReward(RewardKind):
    """Answers what people have decided, and PENDING until then."""

    kind = "human"
    # An answer is one short transaction: to stop it would save nothing.
    stoppable = False

    def __init__(self, options: HumanOptions, limits: Limits) -> None:
        self._options = options
        self._rules = options.rules()
        # One writer at a time is let in anyway; a second call has its samples ready meanwhile.
        self.concurrency = min(2, limits.concurrency)
        self.batch_size = limits.batch_size
        self.description = Description(name="human", version=self._rules.version, remembers=_REMEMBERED_SECONDS)
        self._parts = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Bring the database up to date, waiting for it if need be, and open the page."""
        options = self._options
        self._store = await self._open_store()
        self._parts.push_async_callback(self._store.close)
        app = make_app(
            self._store,
            self._rules,
            title=options.title,
            question=options.question,
            instructions=options.instructions,
            secret=await self._store.secret(),
            secure_cookies=options.secure_cookies,
        )
        page = PageServer(app, options.listen, options.trusted_proxies)
        url = await page.start()
        self._parts.push_async_callback(page.stop)
        closing = asyncio.Event()
        # Never cancelled amid a query: its connection would be lost with the transaction still open.
        self._parts.push_async_callback(asyncio.wait, [asyncio.create_task(self._observe(closing))])
        self._parts.callback(closing.set)
        _log.info("people can rate", page=url)
        if not await self._store.raters():
            _log.warning("nobody can sign in yet: python -m reward_server.human add-rater NAME --database …")
        if options.endpoint_file is not None:
            write_endpoint_file(options.endpoint_file, address=url, metrics_url=None)
            self._parts.callback(options.endpoint_file.unlink, missing_ok=True)

    async def close(self) -> None:
        """Close the page and the database."""
        await self._parts.aclose()

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        """What is known of the samples now; those that are new are put before people."""
        try:
            return await self._store.outcomes(samples)
        except StoreUnavailable as error:
            raise failures.unavailable(str(error), retry_after=self._options.retry_after) from error

    async def _open_store(self) -> Store:
        while True:
            try:
                return await Store.open(self._options.database, self._rules)
            except (DatabaseUrlError, NewerDatabaseError) as error:
                raise RewardLoadError(f"the human reward's database: {error}") from error
            except StoreUnavailable as error:
                if self._options.database.startswith("sqlite"):
                    raise RewardLoadError(f"{self._options.database}: {error}") from error
                _log.warning("waiting for the database of ratings", error=str(error))
                await asyncio.sleep(_CONNECT_PAUSE_SECONDS)

    async def _observe(self, closing: asyncio.Event) -> None:
        while not closing.is_set():
            try:
                queue = await self._store.queue()
                metrics.HUMAN_TICKETS.labels("waiting").set(queue.waiting)
                metrics.HUMAN_TICKETS.labels("leased").set(queue.leased)
                metrics.HUMAN_OLDEST_SECONDS.set(queue.oldest_age_seconds or 0.0)
            except StoreUnavailable:
                pass  # the page and the trainer are told, and look again
            except Exception:
                _log.exception("the queue of ratings cannot be counted")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(closing.wait(), _OBSERVE_SECONDS)
