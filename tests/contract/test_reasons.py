"""The reasons of the contract's tables and those that our servers send are the same ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from rlhf import failures
from tests.contract.conftest import ROOT, Contract
from tests.contract.test_comments import reasons_in

_SERVERS = ("rlhf", "policy_server", "reward_server")


def test_every_reason_that_a_server_sends_is_in_a_table_with_its_code(contract: Contract) -> None:
    assert set(_sent()) - set(_tabled(contract)) == set()


def test_every_reason_in_a_table_is_sent_by_a_server(contract: Contract) -> None:
    assert set(_tabled(contract)) - set(_sent()) == set()


def test_the_domain_is_the_one_that_the_contract_names(contract: Contract) -> None:
    named = {
        domain
        for service in contract.of_kind("service")
        for domain in re.findall(r'domain "([^"]+)"', re.sub(r"\s+", " ", service.comment))
    }
    assert named == {failures.DOMAIN}


def _tabled(contract: Contract) -> Iterator[tuple[str, str]]:
    for service in contract.of_kind("service"):
        yield from reasons_in(service.comment)


def _sent() -> Iterator[tuple[str, str]]:
    """(code, reason) wherever our code makes a failure: RpcFailure(code, …, reason=…) and its two open constructors."""
    for package in _SERVERS:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    yield from _made_by(node)


def _made_by(call: ast.Call) -> Iterator[tuple[str, str]]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("failed_precondition", "aborted") and isinstance(call.args[0], ast.Constant):
        yield name.upper(), str(call.args[0].value)
    if name == "RpcFailure" and isinstance(call.args[0], ast.Attribute):
        for keyword in call.keywords:
            if keyword.arg == "reason" and isinstance(keyword.value, ast.Constant):
                yield call.args[0].attr, str(keyword.value.value)
