"""push_to_hub, against a hub of our own that keeps what it is sent."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load

from tests.support.models import make_byte_tokenizer, make_tiny_gpt2
from trainer import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


class Hub(ThreadingHTTPServer):
    """Takes small files inline, as the real one does for files below 10 MB that its rules call regular."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.server.server_port}/you/policy"
        if self.path == "/api/repos/create":
            self._answer({"url": url, "name": "you/policy"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.messages.append(line["value"]["summary"])
                else:
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}"})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        self.send_error(404)

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_model_value_head_and_tokenizer_are_uploaded_as_one_commit(hub: Hub, tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path, layers=1, width=8))
    trainer = PPOTrainer(PPOConfig(batch_size=1), model, None, make_byte_tokenizer())

    address = trainer.push_to_hub("you/policy", commit_message="After step 1", token="secret")

    assert address.endswith("/commit/" + "0" * 40)
    assert hub.messages == ["After step 1"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= hub.files.keys()
    uploaded = load(hub.files["model.safetensors"])
    assert torch.equal(uploaded["v_head.summary.weight"], model.v_head.summary.weight)


def test_a_model_alone_is_uploaded_without_a_tokenizer(hub: Hub, tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(make_tiny_gpt2(tmp_path, layers=1, width=8))

    model.push_to_hub("you/policy", token="secret")

    assert sorted(hub.files) == ["config.json", "generation_config.json", "model.safetensors"]
