"""docs/security.md says what the code does."""

from __future__ import annotations

import re

import pytest
import yaml
from prometheus_client import REGISTRY

from rlhf.config import ServerSettings
from rlhf.security.identities import _Entry
from rlhf.security.receiving import AT_ONCE, AT_ONCE_OF_ONE
from rlhf.security.roles import ROLES, Role
from rlhf.security.settings import SecuredServerSettings
from tests.support.processes import ROOT
from trainer.settings import AccessSettings

PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_setting_is_on_the_page_with_its_default() -> None:
    own = SecuredServerSettings.model_fields.keys() - ServerSettings.model_fields.keys()
    rows = {
        flag.replace("-", "_"): default
        for flags, default in re.findall(r"^\| (`--.*?) \| (.*?) \|", PAGE, re.MULTILINE)
        for flag in re.findall(r"`--([a-z-]+)`", flags)
    }
    assert rows.keys() == own
    for name, default in rows.items():
        value = SecuredServerSettings.model_fields[name].default
        shown = {None: ("unset", "no TLS"), False: ("off",)}.get(value, (f"{value:g}",) if value else ())
        assert default in shown, name


def test_every_setting_of_the_trainer_is_on_the_page() -> None:
    own = set(AccessSettings.__annotations__)
    assert {name for name in own if f"`--{name.replace('_', '-')}`" in PAGE} == own


def test_every_key_of_an_identity_is_on_the_page() -> None:
    rows = re.findall(
        r"^\| (`[a-z_0-9]+`(?:, `[a-z_0-9]+`)?) \|", PAGE.split("| entry |")[1].split("| role |")[0], re.M
    )
    assert set(re.findall(r"[a-z_0-9]+", " ".join(rows))) == set(_Entry.model_fields)


def test_its_access_file_is_one() -> None:
    block = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    for entry in yaml.safe_load(block.group(1)).values():
        _Entry.model_validate(entry)


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.ADMIN])
def test_the_table_of_roles_names_what_each_may_call(role: Role) -> None:
    row = re.search(rf"^\| `{role}` \| (.*) \|$", PAGE, re.MULTILINE)
    assert row is not None
    said = row.group(1).replace("the same, and", "Generate, StreamGenerate, GetModel,")
    allowed = {rpc.rpartition("/")[2] for rpc, roles in ROLES.items() if rpc.startswith("/rlhf.") and role in roles}
    assert set(re.findall(r"\w+", said)) == allowed


def test_every_metric_of_security_is_on_the_page() -> None:
    prefixes = ("rlhf_credentials_", "rlhf_certificate_", "rlhf_calls_", "rlhf_quota_")
    declared = {metric.name for metric in REGISTRY.collect() if metric.name.startswith(prefixes)}
    named = {name.removesuffix("_total") for name in re.findall(r"(rlhf_[a-z_]+)\{", PAGE)}
    assert declared == named


def test_the_numbers_of_requests_at_once_are_those_of_the_code() -> None:
    assert f"{AT_ONCE} are received at once, {AT_ONCE_OF_ONE} of one caller" in PAGE
    assert f"{AT_ONCE} × `--max-message-bytes`" in PAGE
