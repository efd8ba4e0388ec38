"""The policy server's process: settings → models → engine → services → run until signalled → drain."""

from __future__ import annotations

import asyncio
import sys

from policy_server.settings import PolicySettings
from rlhf.config import load_settings
from rlhf.logs import configure_logging


def main(argv: list[str] | None = None) -> None:
    """Run the process."""
    settings = load_settings(PolicySettings, sys.argv[1:] if argv is None else argv, prog="python -m policy_server")
    configure_logging(settings.log_format, settings.log_level)
    # torch takes seconds to import: only now, so that --help and mistakes in the settings are answered at once
    from policy_server.assembly import serve

    asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
