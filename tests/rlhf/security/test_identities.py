"""The access file: who somebody is, and what is wrong with the file, without a secret in any message."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rlhf.security import identities as identities_module
from rlhf.security.config import CredentialsError
from rlhf.security.identities import Identities, NotIdentifiedError, read_access_file
from rlhf.security.roles import Role

TRAINER, CHAT, BOUND = "trainer-token-0123456789", "chat-token-0123456789", "bound-token-0123456789"
FILE = f"""
trainer:
  roles: [rollout, writer]
  token_file: trainer.token
chat:
  roles: [app]
  token_sha256: [{hashlib.sha256(CHAT.encode()).hexdigest()}]
  quota: {{per_second: 10, burst: 20}}
bound:
  roles: [app]
  token_sha256: [{hashlib.sha256(BOUND.encode()).hexdigest()}]
  certificates: [bound.example]
judge:
  roles: [scorer]
  certificates: ["spiffe://example.org/judge", judge.example]
"""


def write(folder: Path, content: str = FILE) -> Path:
    (folder / "trainer.token").write_text(f"{TRAINER}\nthe-next-{TRAINER}\n")
    file = folder / "access.yaml"
    file.write_text(content)
    return file


@pytest.fixture
def known(tmp_path: Path) -> Identities:
    return read_access_file(write(tmp_path), with_certificates=True)[0]


@pytest.mark.parametrize(
    ("token", "names", "name"),
    [
        (TRAINER, [], "trainer"),
        (f"the-next-{TRAINER}", [], "trainer"),
        (CHAT, ["judge.example"], "chat"),
        (BOUND, ["other.example", "bound.example"], "bound"),
        (None, ["judge.example"], "judge"),
        (None, ["spiffe://example.org/judge", "judge.example"], "judge"),
    ],
)
def test_a_token_decides_and_where_none_is_sent_the_certificate(
    known: Identities, token: str | None, names: list[str], name: str
) -> None:
    assert known.identify(token, names).name == name


@pytest.mark.parametrize(
    ("token", "names", "reason"),
    [
        (None, [], "no_token"),
        (None, ["bound.example"], "no_token"),
        ("", ["judge.example"], "wrong_token"),
        ("wrong", ["judge.example"], "wrong_token"),
        (TRAINER + "x", [], "wrong_token"),
        ("tökén-0123456789-0123", [], "wrong_token"),
        (BOUND, [], "wrong_certificate"),
        (BOUND, ["judge.example"], "wrong_certificate"),
    ],
)
def test_a_wrong_token_is_not_forgiven_for_a_good_certificate(
    known: Identities, token: str | None, names: list[str], reason: str
) -> None:
    with pytest.raises(NotIdentifiedError) as refused:
        known.identify(token, names)
    assert refused.value.reason == reason
    assert not token or token not in str(refused.value)


def test_a_certificate_with_the_names_of_two_identities_is_neither(tmp_path: Path) -> None:
    file = write(
        tmp_path, "a: {roles: [app], certificates: [a.example]}\nb: {roles: [writer], certificates: [b.example]}"
    )
    both, _ = read_access_file(file, with_certificates=True)
    with pytest.raises(NotIdentifiedError, match="several"):
        both.identify(None, ["a.example", "b.example"])


def test_roles_and_quota_are_those_of_the_entry(known: Identities) -> None:
    chat = known.identify(CHAT, [])
    assert chat.roles == {Role.APP}
    assert chat.quota is not None
    assert (chat.quota.per_second, chat.quota.burst) == (10, 20)


def test_every_known_token_is_compared_whether_or_not_one_was_found(
    known: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []
    compare = identities_module.hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return compare(one, other)

    monkeypatch.setattr(identities_module.hmac, "compare_digest", counted)
    known.identify(TRAINER, [])
    found = len(compared)
    with pytest.raises(NotIdentifiedError):
        known.identify("wrong", [])
    assert found == 4
    assert len(compared) - found == 4


SECRET = "a-secret-that-nobody-may-read"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "must hold identities"),
        ("- a", "must hold identities"),
        (f"a: [{SECRET}", "line 1 is not YAML"),
        (f"a:\n  roles: [app]\n  token: {SECRET}\n", "a.token: no such setting"),
        (f"a: {{roles: [app], token_sha256: [{SECRET}]}}", "a.token_sha256.0: String should match"),
        (f"a: {{roles: [{SECRET}], certificates: [x]}}", "a.roles.0: Input should be 'app', 'rollout'"),
        ("a: {roles: [], certificates: [x]}", "a.roles: List should have at least 1 item"),
        ("a: {roles: [app]}", "a: needs token_file, token_sha256 or certificates"),
        ("a b: {roles: [app], certificates: [x]}", "the name of identity 1 must be"),
        (f"a: {SECRET}", "a: Input should be a valid dictionary"),
        ("a: {roles: [app], certificates: [x]}\nb: {roles: [app], certificates: [x]}", "b and a share x"),
        ("a: {roles: [app], token_file: trainer.token}\nb: {roles: [writer], token_file: trainer.token}", "in common"),
        ("a: {roles: [app], certificates: [x], quota: {per_second: 0, burst: 1}}", "a.quota.per_second: Input should"),
        ("a: {roles: [app], token_file: short.token}", "short.token: token 1 is not 16 to 4096"),
        ("a: {roles: [app], token_file: empty.token}", "empty.token: holds no token"),
    ],
)
def test_a_broken_file_is_refused_with_the_place_and_without_what_it_holds(
    tmp_path: Path, content: str, why: str
) -> None:
    (tmp_path / "short.token").write_text("short\n")
    (tmp_path / "empty.token").write_text("\n")
    with pytest.raises(CredentialsError) as refused:
        read_access_file(write(tmp_path, content), with_certificates=True)
    assert why in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "short\n" not in str(refused.value)


def test_certificates_at_a_server_that_asks_for_none_are_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match="bound: certificates need a server with tls_client_ca"):
        read_access_file(write(tmp_path), with_certificates=False)
