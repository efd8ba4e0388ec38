"""Bytes per second of a publish over loopback, against copying the same tensors in one process."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.measuring import Measurement, interleaved
from tests.support.processes import StartProcess
from trainer.clients.publisher import WeightPublisher
from trainer.versions import WeightsVersion

GB = 1e9


async def measure(folder: Path, start: StartProcess, threads: int) -> Measurement:
    """A publish hashes, sends, verifies, stages and swaps; a copy is the floor that memory allows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    size = sum(tensor.nbytes for _, tensor in tensors)
    server = start("policy_server", "--model", str(folder), "--threads", str(threads), "--managed")
    server.wait_serving("rlhf.weights.v1.WeightsService")
    publisher = WeightPublisher(server.address)
    version = 0

    async def publish() -> float:
        nonlocal version
        version += 1
        await publisher.publish(tensors, WeightsVersion("benchmark", 1, version))
        return size / GB

    async def copy() -> float:
        for _, tensor in tensors:
            tensor.clone()
        return size / GB

    try:
        return await interleaved(
            f"publish: {size / 1e6:,.0f} MB of fp32 over loopback", "GB/s", {"copy in memory": copy, "stream": publish}
        )
    finally:
        await publisher.close()
