"""Regenerate the committed stubs from protos/, or check that they and the contract are as they must be."""

from __future__ import annotations

import argparse
import filecmp
import io
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASES = "v*"


def main() -> int:
    """Exit 0 when all is well, 1 when a check failed, after saying what to do about it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to work on (default: this one)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail if the committed stubs differ from fresh ones")
    what.add_argument("--breaking", action="store_true", help="fail if the contract breaks that of the last release")
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.root)
    if arguments.breaking:
        return breaking(arguments.root)
    write(arguments.root)
    return 0


def write(root: Path) -> None:
    """Make the committed stubs what the generator emits: changed ones rewritten, those of deleted files removed."""
    with tempfile.TemporaryDirectory() as folder:
        generate(root / "protos", Path(folder))
        for stub in drifted(root, Path(folder)):
            fresh, committed = Path(folder, stub), root / stub
            if fresh.exists():
                committed.parent.mkdir(parents=True, exist_ok=True)
                committed.write_bytes(fresh.read_bytes())
            else:
                committed.unlink()
            print(f"protos: {'wrote' if fresh.exists() else 'removed'} {stub}")


def check(root: Path) -> int:
    """1 and the command that mends it when a committed stub is missing, differs, or has no .proto any more."""
    with tempfile.TemporaryDirectory() as folder:
        generate(root / "protos", Path(folder))
        differing = drifted(root, Path(folder))
    for stub in differing:
        print(f"protos: {stub} is not what the generator makes of protos/", file=sys.stderr)
    if differing:
        print("protos: run `make protos` and commit the result", file=sys.stderr)
    return 1 if differing else 0


def breaking(root: Path) -> int:
    """1 when `buf breaking` finds that the contract breaks the one of the newest release tag that is merged here."""
    tags = _git(root, "tag", "--list", RELEASES, "--merged", "HEAD", "--sort=-version:refname").split()
    released = [tag for tag in tags if _git(root, "ls-tree", tag, "protos/")]
    if not released:
        print("protos: no release tag holds protos/ yet, so there is nothing to break")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", released[0], "protos"], cwd=root, stdout=subprocess.PIPE, check=True
        )
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as released_protos:
            released_protos.extractall(folder, filter="data")
        against = Path(folder, "protos")
        status = subprocess.run([_tool("buf"), "breaking", "protos", "--against", against], cwd=root).returncode
    if status:
        print(f"protos: this breaks the clients and servers of {released[0]}; add new fields instead", file=sys.stderr)
    return 1 if status else 0


def generate(protos: Path, target: Path) -> None:
    """Write the stubs of every .proto below `protos` into `target`, which gets the layout of the Python packages."""
    # Imported here: --breaking needs no generator.
    from grpc_tools import protoc

    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    includes = [f"-I{protos}", f"-I{files('grpc_tools') / '_proto'}"]
    status = protoc.main(["protoc", *includes, *outputs, *map(str, sorted(protos.rglob("*.proto")))])
    if status:
        sys.exit(f"protos: protoc failed with status {status}")


def drifted(root: Path, fresh: Path) -> list[Path]:
    """Stubs, relative to `root`, that are not the same in the checkout and below `fresh`."""
    stubs = sorted(_stubs(fresh) | _stubs(root / "rlhf", below=root))
    return [stub for stub in stubs if not _same(root / stub, fresh / stub)]


def _stubs(folder: Path, below: Path | None = None) -> set[Path]:
    found: Iterable[Path] = (path for pattern in ("*_pb2*.py", "*_pb2*.pyi") for path in folder.rglob(pattern))
    return {path.relative_to(below or folder) for path in found}


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and filecmp.cmp(one, other, shallow=False)


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command; empty outside a repository, where nothing has been released."""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout


def _tool(name: str) -> Path:
    """The program that this interpreter's environment installed."""
    return Path(sysconfig.get_path("scripts")) / name


if __name__ == "__main__":
    sys.exit(main())
