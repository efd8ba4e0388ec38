"""The hub's models that settings name: fetch them into the cache, or wait until somebody has.

python models.py fetch|wait SETTINGS.yaml …
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

NAMES = ("model", "reference", "reference_model")
# Weights are read from safetensors alone, so the same in other formats is left where it is.
OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]
PATIENCE_SECONDS = 3600.0
POLL_SECONDS = 5.0


def main(argv: Sequence[str]) -> int:
    """0 once every model is in the cache, 1 if that takes more than an hour."""
    order, *files = argv
    deadline = time.monotonic() + PATIENCE_SECONDS
    for name in sorted(named_in(files)):
        if order == "fetch":
            print(f"fetching {name}", flush=True)
            snapshot_download(name, ignore_patterns=OTHER_FORMATS)
        while order == "wait" and not is_cached(name):
            if time.monotonic() > deadline:
                print(f"{name} is still not in the cache: see the Job `models`", file=sys.stderr)
                return 1
            print(f"waiting until {name} is in the cache", flush=True)
            time.sleep(POLL_SECONDS)
    return 0


def named_in(files: Sequence[str]) -> set[str]:
    """The hub's names among the models of these settings; folders are where they are."""
    settings = [yaml.safe_load(Path(file).read_text()) for file in files]
    named = {each[name] for each in settings for name in NAMES if each.get(name)}
    return {name for name in named if not Path(name).is_absolute()}


def is_cached(name: str) -> bool:
    """Whether all of it is there; a fetch that is under way does not count."""
    try:
        snapshot_download(name, ignore_patterns=OTHER_FORMATS, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
