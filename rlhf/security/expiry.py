"""When certificates stop being valid, which the standard library tells of a peer's but not of a file's."""

from __future__ import annotations

import math
import re
import ssl
from datetime import UTC, datetime

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME = 0x17
_VERSION = 0xA0


def first_expiry(chain: bytes) -> float:
    """The earliest end, in seconds since 1970, of the certificates in a PEM file that OpenSSL has read.

    Infinite when they are in a form that only OpenSSL knows.
    """
    certificates = _PEM.findall(chain.decode("ascii", "ignore"))
    return min((_not_after(ssl.PEM_cert_to_DER_cert(pem)) for pem in certificates), default=math.inf)


def _not_after(der: bytes) -> float:
    """RFC 5280, 4.1: of the certificate its body, of that the validity behind serial, algorithm and issuer."""
    fields = _elements(_elements(_elements(der)[0][1])[0][1])
    validity = fields[4 if fields[0][0] == _VERSION else 3][1]
    tag, text = _elements(validity)[1]
    digits = text.decode("ascii").removesuffix("Z")
    if tag == _UTC_TIME:  # two digits of the year, of which 50 and more are of the last century
        digits = ("19" if digits >= "50" else "20") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()


def _elements(content: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element of DER that stands in `content`."""
    elements = []
    while content:
        tag, length, begin = content[0], content[1], 2
        if length & 0x80:
            begin += length & 0x7F
            length = int.from_bytes(content[2:begin], "big")
        elements.append((tag, content[begin : begin + length]))
        content = content[begin + length :]
    return elements
