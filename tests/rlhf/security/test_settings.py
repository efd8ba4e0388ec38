"""What a server may be told about TLS, access and exposure."""

from __future__ import annotations

import pytest
from pydantic_settings import SettingsConfigDict

from rlhf.addresses import is_loopback
from rlhf.config import ConfigurationError, read_settings
from rlhf.security.config import ClientSecurity, ClientTls
from rlhf.security.settings import SecuredServerSettings

TLS = {"tls_cert": "cert.pem", "tls_key": "key.pem"}


class Settings(SecuredServerSettings):
    """A process of this test."""

    model_config = SettingsConfigDict(env_prefix="RLHF_TEST_")


def settings(**values: object) -> Settings:
    return read_settings(Settings, values, {})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"listen": "[::1]:0"},
        {"listen": "localhost:50051"},
        {"listen": "unix:/run/policy.sock"},
        {"listen": "0.0.0.0:50051", "insecure": True},
        {"listen": "0.0.0.0:50051", **TLS, "access_file": "access.yaml"},
        {**TLS, "tls_client_ca": "ca.pem", "health_listen": "0.0.0.0:50061"},
        {"access_file": "access.yaml"},
    ],
)
def test_loopback_needs_nothing_and_another_address_all_of_it_or_a_word(values: dict[str, object]) -> None:
    settings(**values)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"listen": "0.0.0.0:50051"}, "no TLS .* and no an access file|there is no TLS"),
        ({"listen": "[::]:50051", **TLS}, "there is no an access file|access_file"),
        ({"listen": "policy.example:50051", "access_file": "a.yaml"}, "there is no TLS"),
        ({"listen": "127.0.0.1.example:50051"}, "other machines can reach"),
        ({"tls_cert": "cert.pem"}, "tls_cert and tls_key go together"),
        ({"tls_client_ca": "ca.pem"}, "needs TLS"),
    ],
)
def test_what_does_not_fit_together_is_refused(values: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        settings(**values)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("dns:///localhost:1", True),
        ("unix:/run/x", True),
        ("127.0.0.1.example.com:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("policy:1", False),
        (":1", False),
    ],
)
def test_only_what_surely_stays_on_this_machine_is_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


def test_a_server_found_behind_a_name_must_have_a_certificate_for_it_unless_another_was_told() -> None:
    found = ClientSecurity(ClientTls()).for_host("policy.svc")
    told = ClientSecurity(ClientTls(server_name="policy.example")).for_host("policy.svc")
    listed = ClientSecurity(ClientTls()).for_host(None)

    assert [each.tls.server_name for each in (found, told, listed) if each.tls] == ["policy.svc", "policy.example", ""]
    assert ClientSecurity().for_host("policy.svc") == ClientSecurity()
