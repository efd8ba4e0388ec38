"""Judge a reward server: `python -m reward_server.conformance HOST:PORT`."""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from reward_server.conformance.case import CASES, Case
from reward_server.conformance.junit import to_junit
from reward_server.conformance.known import read_known_failures
from reward_server.conformance.material import Material, read_samples
from reward_server.conformance.report import Report
from reward_server.conformance.runner import ExitCode, run
from reward_server.conformance.session import Session, Unreachable
from reward_server.conformance.target import Target

_EXIT_CODES = """\
exit codes:
  0   every MUST and every SHOULD that applies passed
  1   a MUST failed, or a known failure is stale: its case passes, or there is no such case
  2   only SHOULDs failed
  64  the command line, or a file that it names, is wrong
  69  the server, or the reward asked for, could not be reached
"""


class _Parser(argparse.ArgumentParser):
    """argparse's own status for a wrong command line, 2, means something else here."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases and report; the exit code."""
    parser = _make_parser()
    options = parser.parse_args(argv)
    try:
        cases = _selected(options.run, options.skip)
        if options.list:
            for each in cases:
                print(f"{each.id}\n    {each.level.value}: {each.summary}\n    “{each.sentence}”")
            return ExitCode.PASSED
        target = _target(options)
        contents = read_samples(options.samples) if options.samples else ()
        known = read_known_failures(options.known_failures) if options.known_failures else {}
        for file in (options.junit, options.json):
            if file is not None and not file.absolute().parent.is_dir():
                raise ValueError(f"there is no folder for {file}")
            if file is not None and file.is_dir():
                raise ValueError(f"{file} is a folder")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return asyncio.run(_judge(options, target, cases, Material(contents, dict(options.metadata), options.seed), known))


async def _judge(
    options: argparse.Namespace, target: Target, cases: Sequence[Case], material: Material, known: dict[str, str]
) -> int:
    session = Session(
        target, material=material, reward=options.reward, timeout=options.timeout, patience=options.patience
    )
    async with session:
        try:
            outcome = await run(session, cases, known, _show_progress)
            _show_progress(None)
        except Unreachable as error:
            print(f"{target.address}: {error}", file=sys.stderr)
            return ExitCode.UNREACHABLE
    report = Report(session, target, _flags_again(options), options.seed, outcome)
    print(report.text(colour=sys.stdout.isatty()))
    if options.junit is not None:
        options.junit.write_text(to_junit(report), encoding="utf-8")
    if options.json is not None:
        options.json.write_text(report.json(), encoding="utf-8")
    return outcome.exit_code


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reward-conformance",
        description="Judge a reward server by the sentences of rlhf/reward/v1/reward.proto, over the wire.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("address", metavar="HOST:PORT", nargs="?", help="where the server listens")
    add("--list", action="store_true", help="print the cases instead of running them")
    add("--run", metavar="PATTERN", action="append", default=[], help="only cases whose id matches (repeatable)")
    add("--skip", metavar="PATTERN", action="append", default=[], help="no cases whose id matches (repeatable)")
    add("--known-failures", metavar="FILE", type=Path, help="case ids, one a line, with # and the reason behind")
    add("--junit", metavar="FILE", type=Path, help="write the report as JUnit XML, too")
    add("--json", metavar="FILE", type=Path, help="write the report as JSON, too")
    what = parser.add_argument_group("what is asked")
    add = what.add_argument
    add("--reward", metavar="NAME", default="", help="which of the server's rewards (default: its default)")
    add("--metadata", metavar="KEY=VALUE", type=_pair, action="append", default=[], help="a column of every sample")
    add("--samples", metavar="FILE", type=Path, help='JSONL of {"prompt", "completion", "metadata"} to send')
    add("--seed", type=int, default=0, help="in which order samples are drawn (default: 0)")
    add("--timeout", metavar="SECONDS", type=_seconds, default=10.0, help="deadline of an ordinary call (default: 10)")
    add(
        "--patience",
        metavar="SECONDS",
        type=_seconds,
        default=30.0,
        help="how long PENDING samples, and an overloaded server, are asked again (default: 30)",
    )
    access = parser.add_argument_group("how to get in")
    add = access.add_argument
    add("--tls", action="store_true", help="use TLS; the flags below imply it")
    add("--tls-ca", metavar="FILE", type=Path, help="certificates to trust (PEM; default: the public ones)")
    add("--tls-cert", metavar="FILE", type=Path, help="the client's certificate (PEM)")
    add("--tls-key", metavar="FILE", type=Path, help="the client's key (PEM)")
    add("--tls-server-name", metavar="NAME", default="", help="the name in the server's certificate")
    token = access.add_mutually_exclusive_group()
    token.add_argument("--token", default="", help="sent as authorization: Bearer TOKEN")
    token.add_argument("--token-file", metavar="FILE", type=Path, help="a file with the token")
    return parser


def _selected(run_patterns: Sequence[str], skip_patterns: Sequence[str]) -> list[Case]:
    for pattern in (*run_patterns, *skip_patterns):
        if not fnmatch.filter(CASES, pattern):
            raise ValueError(f"no case matches {pattern!r}; --list shows them all")
    return [
        each
        for each in CASES.values()
        if (not run_patterns or any(fnmatch.fnmatchcase(each.id, pattern) for pattern in run_patterns))
        and not any(fnmatch.fnmatchcase(each.id, pattern) for pattern in skip_patterns)
    ]


def _target(options: argparse.Namespace) -> Target:
    if not options.address or ":" not in options.address:
        raise ValueError("where is the server? HOST:PORT is missing")
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ValueError("--tls-cert and --tls-key go together")
    tls_flags = (options.tls_ca, options.tls_cert, options.tls_server_name)
    target = Target(
        options.address,
        tls=options.tls or any(tls_flags),
        ca=options.tls_ca,
        cert=options.tls_cert,
        key=options.tls_key,
        server_name=options.tls_server_name,
        token=options.token_file.read_text().strip() if options.token_file else options.token,
    )
    for file in (target.ca, target.cert, target.key):
        if file is not None:
            file.read_bytes()
    return target


def _flags_again(options: argparse.Namespace) -> list[str]:
    """The flags that a run needs to meet the same server with the same samples; the token is not among them."""
    flags = []
    parser = _make_parser()
    material = ("reward", "samples", "seed", "timeout", "patience")
    for name in (*material, "tls_ca", "tls_cert", "tls_key", "tls_server_name"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    for key, value in options.metadata:
        flags += ["--metadata", f"{key}={value}"]
    return [*flags, "--tls"] if options.tls else flags


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, and below a day")
    return seconds


def _show_progress(each: Case | None) -> None:
    """On a terminal, the case that runs, in a line that the next one takes; None = none."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{each.id if each else ''}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
