"""docs/quickstart.md runs as it stands: its Python blocks, in order, on a small local model and a real server."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.models import make_byte_tokenizer, make_tiny_gpt2
from tests.support.processes import StartProcess
from trainer.clients.policy import POLICY_SERVICE

PAGE = Path(__file__).parents[3] / "docs" / "quickstart.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
SERVED = next(index for index, block in enumerate(BLOCKS) if "policy_server=" in block)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = make_tiny_gpt2(tmp_path / "base")
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = None  # as GPT-2's comes
    tokenizer.save_pretrained(folder)
    return folder


def run(blocks: list[str], names: dict[str, Any], **replaced: str) -> None:
    for block in blocks:
        for placeholder, real in replaced.items():
            block = block.replace({"model": '"gpt2"', "server": '"127.0.0.1:50051"'}[placeholder], repr(real))
        exec(compile(block, str(PAGE), "exec"), names)


def test_only_the_import_line_differs_from_trls() -> None:
    [diff] = re.findall(r"^```diff\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    theirs, ours = diff.splitlines()

    assert theirs.removeprefix("-").replace("from trl ", "from trainer ") == ours.removeprefix("+")
    assert ours.removeprefix("+") in BLOCKS[0]


def test_the_page_runs_in_one_process(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}

    run(BLOCKS[:SERVED], names, model=str(base))

    assert "KL" in capsys.readouterr().out
    assert 1 <= names["response_tensor"][0].numel() <= 20
    assert isinstance(names["response_txt"], str)
    saved = load_file(Path("my-policy") / "model.safetensors")
    began = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert any(not torch.equal(saved[name], began[name]) for name in saved if name in began)
    assert "v_head.summary.weight" in saved


def test_the_page_runs_through_a_policy_server(base: Path, start_process: StartProcess) -> None:
    server = start_process("policy_server", "--model", str(base))
    names: dict[str, Any] = {}
    run(BLOCKS[:SERVED], names, model=str(base))
    server.wait_serving(POLICY_SERVICE)

    run(BLOCKS[SERVED:], names, model=str(base), server=server.address)

    assert names["stats"]["objective/kl"] == pytest.approx(0.0, abs=1.0)  # other weights: tens
