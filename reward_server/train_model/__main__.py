"""Train a reward model from a table of rated texts, and say how to serve it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import EX_CONFIG
from rlhf.extras import brought_by
from rlhf.logs import configure_logging

with brought_by("model"):
    from reward_server.train_model.ratings import TrainingDataError, read_ratings, split
    from reward_server.train_model.training import FROM_A_BASE, FROM_SCRATCH, Recipe, Report, train_reward_model


def main(argv: Sequence[str] | None = None) -> int:
    """Read, split, train, report; the exit status."""
    arguments = _parser().parse_args(argv)
    configure_logging("auto", "info")
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)})
    try:
        rated = read_ratings(arguments.data, text=arguments.text_column, rating=arguments.rating_column)
        train, held_out = split(rated, held_out=arguments.held_out, seed=recipe.seed)
        report = train_reward_model(
            train, held_out, arguments.output, recipe, base=arguments.base, label=arguments.rating_column
        )
    except TrainingDataError as error:
        print(f"reward_server.train_model: {error}", file=sys.stderr)
        return EX_CONFIG
    _show(report, arguments.output)
    return 0


def _show(report: Report, model: Path) -> None:
    pearson, spearman = ("undefined" if each is None else f"{each:.3f}" for each in (report.pearson, report.spearman))
    print(
        f"On {report.held_out} held-out texts: Pearson {pearson}, Spearman {spearman}, RMSE {report.rmse:.3f}; "
        f"the mean rating as every answer has RMSE {report.rmse_constant:.3f}."
    )
    print("To serve it with rewards in the rating's own units:")
    print(_command(report.options(model)))
    print(f"or with -1 for the least rating there was ({report.rating_least:g}), and 1 for the most:")
    print(_command(report.unit_options(model)))


def _command(options: Mapping[str, Any]) -> str:
    shown = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in options.items()}
    return f"  python -m reward_server --reward model --reward-options '{json.dumps(shown)}'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reward_server.train_model",
        description="Train a reward model on rated texts, for python -m reward_server --reward model.",
        allow_abbrev=False,
    )
    count, positive, fraction = _number(int, least=1), _number(float, above=0), _number(float, above=0, below=1)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="table of rated texts: a .csv, .tsv, .jsonl or .parquet file")
    add("--text-column", default="text", help="its column with the text [default: text]")
    add("--rating-column", default="rating", help="its column with the rating, higher is better [default: rating]")
    add("--base", help="model to fine-tune, a folder or hub name [default: a small one is trained from scratch]")
    add("--output", type=Path, required=True, help="folder for the model, absent or empty")
    add("--epochs", type=count, help=f"passes over the training texts [default: {_by_start('epochs')}]")
    add("--batch-size", type=count, default=Recipe.batch_size, help="texts per step [default: %(default)s]")
    add("--learning-rate", type=positive, help=f"its peak [default: {_by_start('learning_rate')}]")
    add("--held-out", type=fraction, default=0.1, help="fraction of the texts to judge by [default: %(default)s]")
    add(
        "--max-tokens",
        type=_number(int, least=4),
        default=Recipe.max_tokens,
        help="longest text; what is longer loses its beginning [tokens; default: %(default)s]",
    )
    add("--seed", type=int, default=Recipe.seed, help="of the split, the weights and the order [default: %(default)s]")
    add("--threads", type=count, help="of the CPU [default: 1 from scratch, as many as torch takes from a base]")
    add("--device", default=Recipe.device, help="auto, cpu, cuda, cuda:1 … [default: %(default)s]")
    return parser


def _by_start(name: str) -> str:
    return f"{getattr(FROM_SCRATCH, name):g} from scratch, {getattr(FROM_A_BASE, name):g} from a base"


def _number(
    kind: Callable[[str], float], *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not (least <= value < below and value > above):
            raise ValueError
        return value

    parse.__name__ = "value"  # argparse: "invalid value value: '0'"
    return parse


if __name__ == "__main__":
    sys.exit(main())
