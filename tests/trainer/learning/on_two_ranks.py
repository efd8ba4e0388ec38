"""torchrun --nproc-per-node 2 -m tests.trainer.learning.on_two_ranks FOLDER: every case by DDP and by FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tests.trainer.learning.cases import CASES, step_through
from trainer.learning.ranks import Ranks


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    ranks = Ranks.joined()
    assert ranks.count == 2
    outcome: dict[str, Any] = {}
    for sharded in (False, True):
        for name, case in CASES.items():
            learner, statistics = step_through(case, folder, accelerator=accelerator, ranks=ranks, sharded=sharded)
            parameters = {name: learner.whole_parameter(name) for name, _ in learner.model.named_parameters()}
            outcome[f"{'fsdp' if sharded else 'ddp'}: {name}"] = {
                "parameters": parameters,
                "statistics": statistics,
                "state": learner.state_dict(),
                "kept_here": sum(each.to_local().numel() if sharded else 0 for each in learner._parameters.values()),
            }
    torch.save(outcome, folder / f"rank-{ranks.index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
