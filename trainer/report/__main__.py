"""python -m trainer.report RUN [OTHER_RUN]: one page that shows a run, or compares two.

Exit codes: 0 the page is written; 78 a folder holds no run; 1 the page can't be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.config import EX_CONFIG
from rlhf.extras import brought_by


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page that these arguments (default: the command line's) ask for and return the exit code."""
    arguments = _parser().parse_args(argv)
    folders = [folder for folder in (arguments.run, arguments.other) if folder is not None]
    output = arguments.output or arguments.run / _page_name(folders)
    with brought_by("report"):
        from trainer.report.page import write_page
        from trainer.report.reading import NoRunError
    try:
        write_page(folders, output)
    except NoRunError as error:
        sys.stderr.write(f"{error}\n")
        return EX_CONFIG
    except OSError as error:
        sys.stderr.write(f"the page can't be written: {error}\n")
        return 1
    print(output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description="Show a run, or compare two, on one HTML page that needs no network. A run may still be going on.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run (--run-dir of the trainer)")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_RUN", help="folder of a run to compare it with")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the page (default: report.html, or compared-with-OTHER_RUN.html, in RUN)",
    )
    return parser


def _page_name(folders: Sequence[Path]) -> str:
    return "report.html" if len(folders) == 1 else f"compared-with-{folders[1].resolve().name}.html"


if __name__ == "__main__":
    sys.exit(main())
