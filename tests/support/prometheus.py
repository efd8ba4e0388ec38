"""Prometheus itself, scraping real processes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.debian import required
from tests.support.processes import wait_for


def promtool() -> str:
    """Prometheus' program that checks rules."""
    return required(shutil.which("promtool"), "prometheus")


class Prometheus:
    """A running server; `url` is its address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str, *, at: float | None = None) -> list[dict[str, Any]]:
        """The series of an instant query; at: Unix seconds, None = now."""
        return self._get("query", query=expression, **({} if at is None else {"time": at}))

    def query_range(self, expression: str, *, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """The series of a range query, as a panel of Grafana asks; Unix seconds."""
        return self._get("query_range", query=expression, start=start, end=end, step=step)

    def label_values(self, selector: str, label: str) -> list[str]:
        """The values of a label over the series of a selector, as a variable of Grafana asks."""
        quoted = urllib.parse.urlencode({"match[]": selector})
        with urllib.request.urlopen(f"{self.url}/api/v1/label/{label}/values?{quoted}", timeout=10) as answer:
            values: list[str] = json.load(answer)["data"]
        return values

    def _get(self, path: str, **parameters: object) -> list[dict[str, Any]]:
        # The time-out covers a Prometheus that waits for a scrape's lock on a busy machine.
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            series: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return series


@contextmanager
def prometheus(folder: Path, targets: Mapping[str, Path], *, rules: Path) -> Iterator[Prometheus]:
    """A server that scrapes every second what the files of `targets`, by job, name (`announce` writes them)."""
    program = required(shutil.which("prometheus"), "prometheus")
    folder.mkdir(parents=True)
    jobs = [
        {"job_name": job, "file_sd_configs": [{"files": [str(file)], "refresh_interval": "1s"}]}
        for job, file in targets.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    log_file = folder / "log.txt"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
                "--enable-feature=exemplar-storage",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        listening = wait_for(
            lambda: re.search(r'msg="Listening on" address=(\S+)', log_file.read_text()),
            within=30,
            what="address of Prometheus",
        )
        url = f"http://{listening[1]}"
        wait_for(lambda: _ready(url), within=60, what="readiness of Prometheus")
        yield Prometheus(url)
    finally:
        process.kill()
        process.wait()


def announce(file: Path, *metrics_urls: str) -> None:
    """Tell Prometheus where a job's processes are."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps([{"targets": [urllib.parse.urlsplit(url).netloc for url in metrics_urls]}]))
    partial.rename(file)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=10):
            return True
    except urllib.error.HTTPError:
        return False
