"""The policy server's process: settings → models → engine → services → run until signalled → drain."""

from __future__ import annotations

import asyncio
import sys
from typing import NoReturn

from policy_server.settings import PolicySettings
from rlhf.config import EX_CONFIG, load_settings
from rlhf.extras import brought_by
from rlhf.logs import configure_logging
from rlhf.tracing import exporting

PROG = "python -m policy_server"


def main(argv: list[str] | None = None) -> None:
    """Run the process."""
    settings = load_settings(PolicySettings, sys.argv[1:] if argv is None else argv, prog=PROG)
    configure_logging(settings.log_format, settings.log_level)
    # torch takes seconds to import: only now, so that --help and mistakes in the settings are answered at once
    with brought_by("policy"):
        from policy_server.assembly import ModelError, serve
    from rlhf.security.config import CredentialsError
    from rlhf.server import BindError

    try:
        with exporting(settings.otlp_endpoint, service="rlhf-policy-server"):
            asyncio.run(serve(settings))
    except (ModelError, CredentialsError) as error:
        _give_up(error, EX_CONFIG)
    except BindError as error:
        _give_up(error, 1)


def _give_up(error: Exception, status: int) -> NoReturn:
    print(f"{PROG}: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(status) from error


if __name__ == "__main__":
    main()
