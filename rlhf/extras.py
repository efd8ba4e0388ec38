"""Optional dependencies: what is missing is named together with the extra that brings it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rlhf.config import EX_CONFIG


@contextlib.contextmanager
def brought_by(extra: str) -> Iterator[None]:
    """Around the imports of a process: a package that is not installed ends it with one line and status 78."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"the package {error.name} is missing; it comes with: pip install 'rlhf-services[{extra}]'"
        sys.stderr.write(message + "\n")
        raise SystemExit(EX_CONFIG) from error
