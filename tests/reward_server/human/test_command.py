"""`python -m reward_server.human`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from reward_server.human.rules import Rules
from reward_server.human.store import Store
from tests.support.processes import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reward_server.human", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


async def test_it_adds_lists_and_removes_raters(tmp_path: Path) -> None:
    database = ("--database", f"sqlite:///{tmp_path}/ratings.db")
    added = run("add-rater", "Ada", "--admin", *database)
    assert added.returncode == 0, added.stderr
    token = added.stdout.strip()
    assert token not in added.stderr
    assert run("list-raters", *database).stdout == "Ada\tadmin\n"

    store = await Store.open(database[1], Rules())
    ada = await store.rater_by_token(token)
    assert ada is not None
    assert ada.is_admin
    assert run("remove-rater", "Ada", *database).returncode == 0
    assert await store.rater_by_token(token) is None
    await store.close()


def test_a_mistake_is_explained_in_a_line(tmp_path: Path) -> None:
    database = ("--database", f"sqlite:///{tmp_path}/ratings.db")
    for arguments, says in (
        (("remove-rater", "Ada", *database), "there is no rater 'Ada'"),
        (("list-raters", "--database", "mysql://x"), "'mysql' is not supported"),
    ):
        refused = run(*arguments)
        assert refused.returncode == 1
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr
