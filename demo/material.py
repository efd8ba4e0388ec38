"""Write the demo's model and prompts into a folder, for a run elsewhere: `python -m demo.material FOLDER`.

FOLDER gets model/, prompts.jsonl and held-out-prompts.jsonl.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from demo.base_model import Recipe, base_model
from demo.corpus import load_reviews
from demo.data import EVALUATION_PROMPTS, HELD_OUT_REVIEWS, split_reviews, write_prompts


def main(argv: Sequence[str]) -> int:
    """Fetch the reviews, train the model, write all three; the exit status."""
    folder = Path(argv[0])
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as made:
        cache = Path(made)
        split = split_reviews(load_reviews(cache), held_out=HELD_OUT_REVIEWS)
        write_prompts(folder, split, evaluation_prompts=EVALUATION_PROMPTS)
        shutil.move(base_model(cache, split, Recipe(), Console()), folder / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
