"""Real processes under test: started, waited for with a deadline, read, killed, and never leaked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN = 90.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

T = TypeVar("T")


def wait_for(condition: Callable[[], T], *, within: float, what: str, every: float = 0.02) -> T:
    """The first true value of `condition()`, asked `every` so many seconds; fails with `what` after `within`."""
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} within {within:g} s")
        time.sleep(every)


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """A process's settings on its command line; those that are None are left out."""
    given = {name.replace("_", "-"): value for name, value in settings.items() if value is not None}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


class ProcessUnderTest:
    """`python -m module …` with its output in a file."""

    def __init__(
        self,
        module: str,
        flags: Sequence[str],
        folder: Path,
        *,
        ranks: int = 1,
        env: dict[str, str] | None = None,
        checkout: Path = ROOT,
    ) -> None:
        """ranks: how many of it torchrun starts, as one world; what is asked and signalled here is torchrun.

        checkout: the folder of the sources that it runs.
        """
        self.module = module
        launcher = (*TORCHRUN, str(ranks)) if ranks > 1 else ()
        self._endpoint_file = folder / "endpoint.json"
        self._endpoint_file.unlink(missing_ok=True)
        self._log_file = folder / "log.txt"
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", module, *flags, "--endpoint-file", str(self._endpoint_file)],
                cwd=checkout,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def address(self) -> str:
        """Where its gRPC server listens, once it does."""
        return self._endpoint()["address"]

    @property
    def metrics_url(self) -> str:
        """Its Prometheus endpoint."""
        return self._endpoint()["metrics_url"]

    @property
    def health_address(self) -> str:
        """Where its health is answered in plaintext."""
        return self._endpoint()["health_address"] or self.address

    def metrics_text(self, accept: str = "*/*") -> str:
        """What its Prometheus endpoint answers now, in the format that `accept` names."""
        request = urllib.request.Request(self.metrics_url, headers={"Accept": accept})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                text: str = answer.read().decode()
        except OSError:
            # An end is told with the log. Its sockets may be closed a moment before it can be waited for.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self._alive()
            raise
        return text

    def log_text(self) -> str:
        """All it has written so far, to stdout and stderr."""
        return self._log_file.read_text(errors="replace")

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def wait_serving(self, service: str = "") -> None:
        """Until its health says that `service` is SERVING."""
        wait_for(
            lambda: self._alive() and health_of(self.health_address, service) == "SERVING",
            within=READY_WITHIN,
            what=f"SERVING {service!r} of {self}",
        )

    def wait_exit(self, within: float = READY_WITHIN) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} still runs after {within:g} s; its log:\n{self.log_text()[-4000:]}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def terminate(self, within: float = 45.0) -> int:
        """SIGTERM; its exit code."""
        if self.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait_exit(within)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def __str__(self) -> str:
        return f"python -m {self.module} (pid {self.pid})"

    def _endpoint(self) -> dict[str, str]:
        """Its addresses, as soon as it has announced them."""
        announced = self._endpoint_file.exists
        wait_for(lambda: announced() or not self._alive(), within=READY_WITHIN, what=f"address of {self}")
        endpoint: dict[str, str] = json.loads(self._endpoint_file.read_text())
        return endpoint

    def _alive(self) -> bool:
        code = self.poll()
        assert code is None, f"{self} ended with {code}; its log:\n{self.log_text()[-4000:]}"
        return True


def health_of(address: str, service: str) -> str:
    """What the health service at `address` says of `service`; "" when it does not answer."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=2, wait_for_ready=False
            )
        except grpc.RpcError:
            return ""
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def torchrun(count: int, module: str, *arguments: str, within: float = 240.0) -> None:
    """Run `python -m module …` in `count` processes of one torch.distributed world, to a successful end."""
    ended = subprocess.run(
        [sys.executable, *TORCHRUN, str(count), "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


StartProcess = Callable[..., ProcessUnderTest]


@contextlib.contextmanager
def process_factory(folder: Path) -> Iterator[StartProcess]:
    """`start(module, *flags, listen=…, env=…)`: whatever it starts is killed when the block ends.

    Servers listen where the OS picks, unless `listen` names an address (to restart one where it was).
    """
    started: list[ProcessUnderTest] = []

    def start(
        module: str,
        *flags: str,
        listen: str | None = "127.0.0.1:0",
        ranks: int = 1,
        env: dict[str, str] | None = None,
        checkout: Path = ROOT,
    ) -> ProcessUnderTest:
        own = folder / f"{module.replace('.', '-')}-{len(started)}"
        own.mkdir(parents=True)
        address = ("--listen", listen) if listen is not None else ()
        given = [*flags, *address, "--metrics-port", "auto"]
        process = ProcessUnderTest(module, given, own, ranks=ranks, env=env, checkout=checkout)
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
