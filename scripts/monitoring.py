"""Write what k8s/monitoring holds twice or what is tedious by hand, or check that it is as it must be.

prometheusrule.yaml is rules.yaml for the Prometheus operator; dashboards/*.json are scripts/dashboards.py for Grafana.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from dashboards import DASHBOARDS

FOLDER = Path(__file__).resolve().parent.parent / "k8s" / "monitoring"

_RESOURCE = """\
# Made from rules.yaml by `make monitoring`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: rlhf
  labels:
    app.kubernetes.io/part-of: rlhf
spec:
"""


def main() -> int:
    """Exit 0 when all is well, 1 when --check found something else than would be written."""
    files = made()
    if sys.argv[1:] == ["--check"]:
        differing = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
        for path in differing:
            print(f"monitoring: {path.relative_to(FOLDER.parents[1])} is not what its source makes", file=sys.stderr)
        if differing:
            print("monitoring: run `make monitoring` and commit the result", file=sys.stderr)
        return 1 if differing else 0
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


def made() -> dict[Path, str]:
    """The text of every file, by its path."""
    rules = (FOLDER / "rules.yaml").read_text()
    groups = rules[rules.index("groups:") :]
    return {
        FOLDER / "prometheusrule.yaml": _RESOURCE + textwrap.indent(groups, "  "),
        **{
            FOLDER / "dashboards" / f"{each.uid}.json": json.dumps(each.to_json(), indent=2, ensure_ascii=False) + "\n"
            for each in DASHBOARDS
        },
    }


if __name__ == "__main__":
    sys.exit(main())
