"""The page itself: one file with everything in it, which asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.report import completions, facts
from trainer.report.charts import MOST_POINTS, Chart, sections
from trainer.report.notes import notes
from trainer.report.reading import Run, best_step, read_run, with_samples

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
# uPlot.iife.min.js and uPlot.min.css of the npm package uplot 1.6.32, unchanged.
_SCRIPTS = ("vendor/uplot-1.6.32.min.js", "page.js")
_STYLES = ("vendor/uplot-1.6.32.min.css", "page.css")


def write_page(folders: Sequence[Path], output: Path) -> None:
    """Show the run in the one folder, or compare those in two, on a page at `output`, which is replaced whole.

    Raises NoRunError when a folder holds no run, OSError when the page can't be written.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = [read_run(folder, name=name) for folder, name in zip(folders, names, strict=True)]
    wanted = completions.choose_steps(runs)
    runs = [with_samples(run, folder, wanted) for run, folder in zip(runs, folders, strict=True)]
    html = render(runs)
    temporary = output.with_name(f".{output.name}.tmp")
    # A lone surrogate, which JSON can spell and UTF-8 can't, becomes a question mark.
    temporary.write_bytes(html.encode("utf-8", "replace"))
    temporary.replace(output)


def render(runs: Sequence[Run]) -> str:
    """The page of one or two runs, as HTML. Whatever a run holds is text there."""
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["told"] = facts.told
    environment.filters["shortened"] = completions.shortened
    shown = sections(runs)
    scripts, styles = ([(_STATIC / name).read_text("utf-8") for name in names] for names in (_SCRIPTS, _STYLES))
    return environment.get_template("page.html").render(
        # Of what runs on the page, only what is ours does: a sample that got out of its place could do nothing.
        policy=f"default-src 'none'; img-src data:; script-src {_digests(scripts)}; style-src {_digests(styles)}",
        scripts=[Markup(script) for script in scripts],
        styles=[Markup(style) for style in styles],
        runs=runs,
        title=" and ".join(run.name for run in runs),
        sections=shown,
        data={
            "charts": {chart.name: _data(chart) for section in shown for chart in section.charts},
            "best": [best_step(run.evaluations) for run in runs],
        },
        notes=[(run, notes(run)) for run in runs],
        identity=facts.identity(runs),
        both_ends=facts.both_ends(runs),
        best=[(run, facts.best(run)) for run in runs],
        times=[(run, facts.time_table(run)) for run in runs],
        drops=[(run, facts.drop_table(run)) for run in runs],
        changed=facts.changed_settings(runs),
        settings=facts.all_settings(runs),
        held_out=completions.held_out_prompts(runs),
        training=completions.training_steps(runs),
        limits={
            "at_an_end": facts.MOST_AT_AN_END,
            "points": MOST_POINTS,
            "thinned": any(len(run.steps) > MOST_POINTS for run in runs),
            "prompts": completions.MOST_PROMPTS,
            "evaluations": completions.MOST_EVALUATIONS,
            "training_steps": completions.MOST_TRAINING_STEPS,
        },
    )


def _data(chart: Chart) -> dict[str, Any]:
    """A chart for the script: numbers to six digits, which no screen can show more of."""
    return {
        "title": chart.title,
        "floor": chart.floor,
        "stacked": chart.stacked,
        "resumes": chart.resumes,
        "curves": [
            {
                "label": curve.label,
                "style": curve.style,
                "dots": curve.held_out,
                "x": [step for step, _ in curve.points],
                "y": [None if value is None else float(f"{value:.6g}") for _, value in curve.points],
            }
            for curve in chart.curves
        ],
    }


def _digests(sources: Sequence[str]) -> str:
    """The sources as a content security policy names them."""
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" for source in sources
    )
