"""Write the demo's model and prompts into a folder, for a run elsewhere: `python -m demo.material FOLDER`.

FOLDER must be absent, and gets model/, prompts.jsonl and held-out-prompts.jsonl.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from demo.base_model import Recipe, base_model
from demo.corpus import load_reviews
from demo.data import EVALUATION_PROMPTS, HELD_OUT_REVIEWS, split_reviews, write_prompts

CACHE = Path(".cache/demo")
"""That of `python -m demo`."""


def main(argv: Sequence[str]) -> int:
    """Fetch the reviews and train the model, unless they are cached, and write; the exit status."""
    folder = Path(argv[0])
    split = split_reviews(load_reviews(CACHE), held_out=HELD_OUT_REVIEWS)
    shutil.copytree(base_model(CACHE, split, Recipe(), Console()), folder / "model")
    write_prompts(folder, split, evaluation_prompts=EVALUATION_PROMPTS)
    # Other users read it, and safetensors makes files for its own alone.
    for file in (folder / "model").iterdir():
        file.chmod(0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
