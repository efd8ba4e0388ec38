"""PPO with a reward server that is not ours: the example in Go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.training import World, assert_finished
from tests.reward_server.examples.servers import EXAMPLES, ExampleServer

pytestmark = pytest.mark.examples

STEPS, BATCH = 8, 64
ROWS = 200


@pytest.fixture(params=["go"])
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ExampleServer]:
    server = ExampleServer(EXAMPLES[request.param], tmp_path / "example", "127.0.0.1:0")
    server.wait_bound()
    yield server
    server.kill()


def test_training_on_it_makes_the_reward_rise(world: World, example: ExampleServer, tmp_path: Path) -> None:
    # One byte is a whole completion, and the untrained model writes this one 4 times in 100.
    data = tmp_path / "answers.jsonl"
    rows = ({"prompt": f"The film {row} was", "answer": "i"} for row in range(ROWS))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    trainer = world.trainer(
        "example",
        reward=example,
        data=data,
        steps=STEPS,
        batch_size=BATCH,
        mini_batch_size=16,
        max_new_tokens=1,
        learning_rate=3e-3,
        init_kl_coef=0.02,
        eval_prompts=64,
        eval_every=STEPS,
        save_every=STEPS,
        rollout_concurrency=16,
    )

    assert_finished(trainer)
    first, last = world.lines("example", "metrics.jsonl", "evaluation")
    assert last["reward_mean"] > first["reward_mean"] + 0.5
    trained = world.lines("example", "samples.jsonl")[-1]
    assert trained["components"].keys() == {"match", "format", "length"}
    assert trained["reward"] == sum(trained["components"].values())
