"""A real PostgreSQL for tests, in a folder of its own, reached by a Unix socket: no port, no password."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.support.debian import required


class PostgresServer:
    """A running server; every test takes a database of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(host=str(self._folder), user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://postgres@/{name}?host={self._folder}"

    def stop(self) -> None:
        """At once: connections are cut, commits are kept."""
        _run("pg_ctl", "stop", "-D", str(self._folder / "data"), "-m", "immediate", "-w")

    def start(self) -> None:
        """Start it, again."""
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._folder}' -c fsync=off"
        log = str(self._folder / "log.txt")
        _run("pg_ctl", "start", "-D", str(self._folder / "data"), "-l", log, "-o", options, "-w")


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """One that runs until the block ends; skips the test where PostgreSQL is not installed."""
    _binary("initdb")
    # Short: a socket's path has 107 bytes at most, and pytest's folders are deep.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    server = PostgresServer(folder)
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, _unprivileged())
        _run("initdb", "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _run(program: str, *arguments: str) -> None:
    # PostgreSQL refuses to run as root. A pipe would never close: the server inherits it.
    user = _unprivileged() if os.geteuid() == 0 else None
    done = subprocess.run(
        [_binary(program), *arguments], user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/tmp"
    )
    assert done.returncode == 0, f"{program} ended with {done.returncode}"


def _binary(program: str) -> str:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: int(path.parts[4]))
    return required(str(installed[-1]) if installed else shutil.which(program), "postgresql")


def _unprivileged() -> str:
    """The user that Debian's package makes."""
    return pwd.getpwnam("postgres").pw_name
