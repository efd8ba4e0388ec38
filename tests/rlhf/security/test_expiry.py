from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from rlhf.metrics import CERTIFICATE_EXPIRY
from rlhf.security.config import ClientTls
from rlhf.security.expiry import first_expiry
from rlhf.security.tls import channel_credentials
from tests.support.certificates import Authority


# X.509 writes years from 2050 on in another form.
@pytest.mark.parametrize("year", [2026, 2049, 2050, 2099])
def test_the_end_of_a_certificate_is_read_from_its_file(tmp_path: Path, year: int) -> None:
    end = datetime(year, 12, 31, 23, 59, 58, tzinfo=UTC)
    cert, _ = Authority(tmp_path).issue("localhost", not_after=end)

    assert first_expiry(cert.read_bytes()) == end.timestamp()


def test_of_a_chain_the_first_end_counts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    ends = [datetime(year, 6, 1, tzinfo=UTC) for year in (2040, 2030, 2060)]
    chain = [authority.issue("localhost", not_after=end)[0].read_bytes() for end in ends]

    assert first_expiry(b"a comment\n".join(chain)) == ends[1].timestamp()


def test_the_metric_follows_the_file_that_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.security.reloading.LOOK_EVERY_SECONDS", 0)
    authority = Authority(tmp_path)
    old, new = datetime(2030, 1, 1, tzinfo=UTC), datetime(2031, 1, 1, tzinfo=UTC)
    cert, key = authority.issue("localhost", not_after=old)
    shown = CERTIFICATE_EXPIRY.labels("client certificate", str(cert))._value
    credentials = channel_credentials(ClientTls(cert=cert, key=key))
    assert shown.get() == old.timestamp()

    cert.write_text("broken")
    credentials.current()
    assert shown.get() == old.timestamp()

    authority.issue("localhost", not_after=new)
    credentials.current()
    assert shown.get() == new.timestamp()
