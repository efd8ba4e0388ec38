"""Who may rate: `python -m reward_server.human add-rater Ada --database sqlite:///ratings.db`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from rlhf.extras import brought_by

with brought_by("human"):
    from reward_server.human.database import DatabaseUrlError
    from reward_server.human.migrations import NewerDatabaseError
    from reward_server.human.options import DEFAULT_DATABASE
    from reward_server.human.rules import Rules
    from reward_server.human.store import Store, StoreUnavailable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return asyncio.run(_run(arguments))
    except (DatabaseUrlError, NewerDatabaseError, StoreUnavailable, ValueError) as error:
        print(f"reward_server.human: {error}", file=sys.stderr)
        return 1


async def _run(arguments: argparse.Namespace) -> int:
    store = await Store.open(arguments.database, Rules())
    try:
        match arguments.command:
            case "add-rater":
                print(await store.add_rater(arguments.name, is_admin=arguments.admin))
                print("This token signs in; it is not shown again.", file=sys.stderr)
            case "remove-rater":
                if not await store.remove_rater(arguments.name):
                    raise ValueError(f"there is no rater {arguments.name!r}")
            case "list-raters":
                for rater in await store.raters():
                    print(f"{rater.name}\tadmin" if rater.is_admin else rater.name)
        return 0
    finally:
        await store.close()


def _parser() -> argparse.ArgumentParser:
    database = argparse.ArgumentParser(add_help=False)
    database.add_argument(
        "--database", default=DEFAULT_DATABASE, help="the reward's option of that name (default: %(default)s)"
    )
    parser = argparse.ArgumentParser(prog="python -m reward_server.human", description="Who may rate.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add-rater", parents=[database], help="print a token for somebody new")
    add.add_argument("name", help="how administrators and exports call them")
    add.add_argument("--admin", action="store_true", help="may see the numbers and export ratings, too")
    remove = commands.add_parser("remove-rater", parents=[database], help="make a token void; the ratings stay")
    remove.add_argument("name")
    commands.add_parser("list-raters", parents=[database], help="print the names of those who have a token")
    return parser


if __name__ == "__main__":
    sys.exit(main())
