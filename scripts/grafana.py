"""Panels and dashboards as Grafana imports them: no more of its schema than ours need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 41  # of Grafana 12; newer ones migrate it when they load it
_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One panel: each query is (PromQL, legend). unit: one of Grafana's names; kind: a panel type of Grafana's."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    description: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 7


@dataclass(frozen=True)
class Variable:
    """A choice at the head of the dashboard, made from the values that a label has; several may be chosen."""

    name: str
    query: str
    several: bool = True


@dataclass(frozen=True)
class Dashboard:
    """Panels below headings, read from left to right; `uid` never changes, since links hold it."""

    uid: str
    title: str
    variables: Sequence[Variable]
    rows: Sequence[tuple[str, Sequence[Panel]]]

    def to_json(self) -> dict[str, Any]:
        """As Grafana imports it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["rlhf"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "timezone": "browser",
            "links": [
                {"type": "dashboards", "tags": ["rlhf"], "title": "RLHF", "asDropdown": True, "keepTime": True},
            ],
            "annotations": {"list": []},
            "templating": {"list": [_datasource_variable(), *map(_variable, self.variables)]},
            "panels": _laid_out(self.rows),
        }


def _laid_out(rows: Sequence[tuple[str, Sequence[Panel]]]) -> list[dict[str, Any]]:
    laid_out: list[dict[str, Any]] = []
    top = 0
    for heading, panels in rows:
        laid_out.append(
            {
                "id": len(laid_out) + 1,
                "type": "row",
                "title": heading,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
            }
        )
        top += 1
        left = tallest = 0
        for panel in panels:
            if left + panel.width > _COLUMNS:
                top, left, tallest = top + tallest, 0, 0
            position = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            laid_out.append({"id": len(laid_out) + 1, **_panel(panel), "gridPos": position})
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest
    return laid_out


def _panel(panel: Panel) -> dict[str, Any]:
    heatmap = panel.kind == "heatmap"
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": expression,
            "legendFormat": legend,
            "format": "heatmap" if heatmap else "time_series",
            "range": True,
            "exemplar": "_bucket" in expression and not heatmap,
        }
        for index, (expression, legend) in enumerate(panel.queries)
    ]
    made: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": targets,
    }
    if panel.kind == "stat":
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "textMode": "auto"}
    elif heatmap:
        made["options"] = {"calculate": False, "yAxis": {"unit": panel.unit}}
    else:
        made["fieldConfig"]["defaults"]["custom"] = {"lineWidth": 1, "fillOpacity": 5, "showPoints": "auto"}
        made["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi"},
        }
    return made


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": variable.several,
        "includeAll": variable.several,
        **({"current": {"text": ["All"], "value": ["$__all"]}} if variable.several else {}),
    }
