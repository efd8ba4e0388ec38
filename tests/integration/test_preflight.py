"""trainer --check, and every start, against real servers: each planted mistake is told with how to mend it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer

from rlhf.config import read_settings
from rlhf.fingerprints import tokenizer_digest
from tests.integration.training import published
from tests.support.models import make_byte_tokenizer, make_tiny_gpt2
from tests.support.processes import ROOT, ProcessUnderTest, StartProcess, as_flags, process_factory
from trainer.adapters import add_adapter, lora_config
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.run.checking import check
from trainer.run.checkpoints import CheckpointStore, Pins, RunState
from trainer.run.findings import Outcome
from trainer.run.runfolder import RunIdentity, lock_run_folder, store_identity
from trainer.settings import TrainerSettings

CHECKS = [
    *("run folder", "model", "data", "prompts", "disk space"),
    *("policy server", "tokenizer", "logit columns", "context", "weights", "reference"),
    *("reward server", "reward columns", "replicas", "log-probabilities"),
]

NEEDS_STARS = """
def reward(prompts, completions, stars, **columns):
    return [float(each) for each in stars]
"""


class Servers:
    """Policy servers by name, each started when it is first asked for, and one reward server."""

    def __init__(self, folder: Path, start: StartProcess) -> None:
        self.folder = folder
        self._start = start
        self._policies: dict[str, ProcessUnderTest] = {}
        self.model = make_tiny_gpt2(folder / "model")
        self.weights_root = folder / "weights"
        self.weights_root.mkdir()
        self.data = self.rows("data", [{"prompt": f"The film {row} was", "stars": row % 5} for row in range(40)])
        file = folder / "stars.py"
        file.write_text(NEEDS_STARS)
        self.reward = start("reward_server", "--reward", f"{file}:reward")

    def rows(self, name: str, rows: list[dict[str, Any]]) -> str:
        """A file of prompts."""
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    def policy(self, name: str = "plain", *flags: str, model: Path | None = None) -> str:
        """The address of one that serves what it was loaded with."""
        return self.policy_process(name, *flags, model=model).address

    def policy_process(self, name: str = "plain", *flags: str, model: Path | None = None) -> ProcessUnderTest:
        """The same, as a process."""
        if name not in self._policies:
            root = ("--weights-root", str(self.weights_root))
            self._policies[name] = self._start(
                "policy_server", "--model", str(model or self.model), "--threads", "1", *root, *flags
            )
        self._policies[name].wait_serving()
        return self._policies[name]

    def start_managed(self) -> ProcessUnderTest:
        """One that waits for its trainer's first publish."""
        return self._start("policy_server", "--model", str(self.model), "--threads", "1", "--managed")

    def settings(self, run_dir: Path, **given: Any) -> dict[str, Any]:
        """Of a run that fits, but for what is given."""
        self.reward.wait_serving("rlhf.reward.v1.RewardService")
        fitting: dict[str, Any] = {
            "model": str(self.model),
            "reward_server": self.reward.address,
            "data": self.data,
            "run_dir": run_dir,
            "batch_size": 8,
            "mini_batch_size": 4,
            "max_new_tokens": 32,
            "check_patience": 30.0,
            "threads": 1,
            **given,
        }
        return fitting if "policy_server" in fitting else {**fitting, "policy_server": self.policy()}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Shared, since processes cost seconds to start; a check changes none of them."""
    folder = tmp_path_factory.mktemp("preflight")
    with process_factory(folder / "processes") as start:
        yield Servers(folder, start)


def trainer(settings: Mapping[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", *as_flags(settings), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_run_that_fits_passes_every_check_and_nothing_is_changed(servers: Servers, tmp_path: Path) -> None:
    settings = servers.settings(tmp_path / "run", weights_folder=servers.weights_root)

    checked = trainer(settings, "--check")

    assert checked.returncode == 0, checked.stdout + checked.stderr
    lines = [line.split(maxsplit=1) for line in checked.stdout.splitlines()]
    assert [(outcome, rest[: len(name)]) for (outcome, rest), name in zip(lines, CHECKS, strict=True)] == [
        ("ok", name) for name in CHECKS
    ]
    assert re.search(r"reference \S+ nats apart, policy \S+ nats apart \(limit 0.001\)", lines[-1][1])
    assert not list(tmp_path.iterdir())
    assert not list(servers.weights_root.iterdir())
    assert published(servers.policy_process()) == 0


def resumed(servers: Servers, run: Path, *, adapter_rank: int | None = None, **pins: str) -> dict[str, Any]:
    """Settings that go on with a run at step 3, which began with what fits, but for `pins`."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(servers.model)
    if adapter_rank is not None:
        add_adapter(model.pretrained_model, lora_config(adapter_rank, 2 * adapter_rank, None))
    tokenizer = AutoTokenizer.from_pretrained(servers.model)
    began = Pins(
        **{"reference_digest": "xxh3_128:0", "tokenizer_digest": tokenizer_digest(tokenizer), "reward_version": "1"}
        | pins
    )
    run.mkdir()
    store_identity(run, RunIdentity("resumed", 1))
    CheckpointStore(run / "checkpoints", keep=3).save(
        RunState("resumed", 1, began, completed_step=3),
        model=model,
        tokenizer=tokenizer,
        learner_state={},
    )
    return {"resume": True}


def with_file(run: Path) -> dict[str, Any]:
    run.mkdir()
    (run / "notes.txt").touch()
    return {}


def with_a_run(run: Path) -> dict[str, Any]:
    run.mkdir()
    store_identity(run, RunIdentity("earlier", 1))
    return {}


def other_tokenizer(servers: Servers) -> str:
    model = servers.folder / "other tokenizer"
    if not model.exists():
        make_tiny_gpt2(model)
        make_byte_tokenizer(chat_template="{{ messages }}").save_pretrained(model)
    return servers.policy("other tokenizer", model=model)


def other_model(servers: Servers, name: str, **shape: Any) -> str:
    model = servers.folder / name
    return servers.policy(name, model=model if model.exists() else make_tiny_gpt2(model, **shape))


class Mistake(NamedTuple):
    """A run that fits but for what `plant(servers, run_dir)` makes; `check` fails, and says `fix`."""

    name: str
    plant: Callable[[Servers, Path], dict[str, Any]]
    check: str
    fix: str


MISTAKES = [
    Mistake(
        "another tokenizer",
        lambda servers, _: {"policy_server": other_tokenizer(servers)},
        "tokenizer",
        "start it with the same --model",
    ),
    Mistake(
        "a wider vocabulary",
        lambda servers, _: {"policy_server": other_model(servers, "wider", vocab=300)},
        "logit columns",
        "300 logit columns, the trainer's --model 257: start it with the same --model",
    ),
    Mistake(
        "a smaller model of the same vocabulary",
        lambda servers, _: {"policy_server": other_model(servers, "smaller", layers=1)},
        "weights",
        "start it with the same --model",
    ),
    Mistake(
        "a reference of other weights",
        lambda servers, _: {"policy_server": other_model(servers, "other weights", seed=7)},
        "reference",
        "start the server with that as its --reference, or say --other-reference",
    ),
    Mistake(
        "a context too small for prompt and completion",
        lambda servers, _: {"policy_server": servers.policy("small context", "--max-context-tokens", "64")},
        "context",
        "lower --max-prompt-tokens or --max-new-tokens, or raise its limit",
    ),
    Mistake(
        "a gap that the serving type can't keep",
        lambda servers, _: {"policy_server": servers.policy("16 bits", "--dtype", "bfloat16"), "max_logprob_gap": 1e-6},
        "log-probabilities",
        r"Serve in float32 \(--dtype\)",
    ),
    Mistake(
        "the reward server as policy server",
        lambda servers, _: {"policy_server": servers.reward.address},
        "policy server",
        "does not know rlhf.policy.v1.PolicyService/GetModel.*Correct --policy-server",
    ),
    Mistake(
        "the policy server as reward server",
        lambda servers, _: {"reward_server": servers.policy()},
        "reward server",
        "does not know rlhf.reward.v1.RewardService/GetRewardInfo.*Correct --reward-server",
    ),
    Mistake(
        "no policy server",
        lambda servers, _: {"policy_server": "127.0.0.1:1", "check_patience": 0.5},
        "policy server",
        "within 0.5 seconds .*UNAVAILABLE.*: start it, or correct --policy-server",
    ),
    Mistake(
        "no reward server",
        lambda servers, _: {"reward_server": "127.0.0.1:1", "check_patience": 0.5},
        "reward server",
        "within 0.5 seconds .*UNAVAILABLE.*: start it, or correct --reward-server",
    ),
    Mistake(
        "data without a column that the reward needs",
        lambda servers, _: {"data": servers.rows("without stars", [{"prompt": "a", "year": "1999"}])},
        "reward columns",
        r"needs the column\(s\) stars; the data has year: add them to --data",
    ),
    Mistake(
        "held-out data without a column that the reward needs",
        lambda servers, _: {"eval_data": servers.rows("held out", [{"prompt": "a"}])},
        "reward columns",
        "add them to --eval-data",
    ),
    Mistake(
        "no column of that name",
        lambda servers, _: {"prompt_column": "text"},
        "data",
        r"no column 'text' \(--prompt-column\); it has 'prompt', 'stars'",
    ),
    Mistake(
        "no data", lambda servers, _: {"data": servers.rows("empty", [])}, "data", r"give one that has some \(--data"
    ),
    Mistake(
        "prompts that are all too long",
        lambda servers, _: {"max_prompt_tokens": 3},
        "prompts",
        "raise --max-prompt-tokens",
    ),
    Mistake("no such model", lambda servers, _: {"model": "nowhere"}, "model", r"can't load nowhere \(--model\)"),
    Mistake(
        "completions longer than the context",
        lambda servers, _: {"max_new_tokens": 200},
        "model",
        "lower --max-new-tokens",
    ),
    Mistake(
        "LoRA on layers that the model doesn't have",
        lambda servers, _: {"lora_rank": 4, "lora_targets": "c_attn,q_proj"},
        "model",
        "--lora-targets: target_modules: q_proj is no linear layer of GPT2LMHeadModel, which has c_attn, c_fc, c_proj",
    ),
    Mistake(
        "LoRA in a run that trains all weights",
        lambda servers, run: {**resumed(servers, run), "lora_rank": 4},
        "model",
        "--lora-rank is 4, but this run trains all weights: leave it out",
    ),
    Mistake(
        "all weights in a run that trains an adapter",
        lambda servers, run: resumed(servers, run, adapter_rank=4),
        "model",
        "holds a LoRA adapter: give the --lora-rank",
    ),
    Mistake(
        "another adapter than the run's",
        lambda servers, run: {**resumed(servers, run, adapter_rank=4), "lora_rank": 8},
        "model",
        r"began with --lora-rank 4, --lora-alpha 8 and an adapter in 8 layers \(c_attn, c_fc, c_proj\)",
    ),
    Mistake(
        "another model under the run's adapter",
        lambda servers, run: {**resumed(servers, run, adapter_rank=4, base_digest="xxh3_128:0"), "lora_rank": 4},
        "model",
        "is not what this run's adapter is of .*: put its files back",
    ),
    Mistake("a folder with files", lambda _, run: with_file(run), "run folder", "give another --run-dir"),
    Mistake("a folder with a run", lambda _, run: with_a_run(run), "run folder", "go on with it by --resume"),
    Mistake(
        "a reference that is not the run's",
        lambda servers, run: resumed(servers, run),
        "reference",
        "Use the reference of the run's beginning",
    ),
    Mistake(
        "a reward that is not the run's",
        lambda servers, run: resumed(servers, run, reward_version="older"),
        "reward server",
        "Start the old one again, or begin a new run",
    ),
    Mistake(
        "a weights folder that the server does not see",
        lambda servers, run: {"weights_folder": servers.folder},
        "weights",
        "give the server's --weights-root as this process sees it",
    ),
    Mistake(
        "a weights folder that is not there",
        lambda servers, run: {"weights_folder": servers.folder / "nowhere"},
        "weights",
        "make it, or leave it out",
    ),
]


async def checked(settings: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], int]:
    """What failed and what passed, by check, and the exit code."""
    report, code = await check(read_settings(TrainerSettings, settings, {}))
    found: dict[Outcome, dict[str, str]] = {outcome: {} for outcome in Outcome}
    for line in report.splitlines():
        outcome = next(each for each in Outcome if line.startswith(each.value))
        name = next(each for each in CHECKS if line.removeprefix(outcome.value).lstrip().startswith(each))
        found[outcome][name] = line.partition(name)[2].strip()
    return found[Outcome.FAILED], found[Outcome.OK], code


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
async def test_a_planted_mistake_is_found_and_told_with_how_to_mend_it(
    servers: Servers, tmp_path: Path, mistake: Mistake
) -> None:
    run = tmp_path / "run"
    settings = servers.settings(run, **mistake.plant(servers, run))
    before = files(tmp_path)

    failed, passed, code = await checked(settings)

    assert code == 78
    assert mistake.check in failed, failed
    assert re.search(mistake.fix, failed[mistake.check]), failed[mistake.check]
    assert len(passed) >= 3, "what does not depend on the mistake is checked all the same"
    assert files(tmp_path) == before


async def test_a_folder_that_another_trainer_runs_in_is_told(servers: Servers, tmp_path: Path) -> None:
    with lock_run_folder(tmp_path / "run"):
        failed, _, code = await checked(servers.settings(tmp_path / "run"))

    assert code == 78
    assert "another trainer is running in this folder; stop it, or give another --run-dir" in failed["run folder"]


async def test_a_disk_without_room_for_the_checkpoints_is_told(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**6))  # type: ignore[attr-defined]

    failed, _, code = await checked(servers.settings(tmp_path / "run"))

    assert code == 78
    assert "1 MB free, but 5 checkpoints of 454 kB, 2 models of 151 kB need 2.57 MB" in failed["disk space"]
    assert "make room, lower --keep-checkpoints (3), or give a --run-dir elsewhere" in failed["disk space"]


async def test_all_mistakes_are_told_at_once(servers: Servers, tmp_path: Path) -> None:
    settings = servers.settings(
        tmp_path / "run",
        policy_server=other_model(servers, "wider", vocab=300),
        data=servers.rows("empty", []),
        reward_server="127.0.0.1:1",
        check_patience=5.0,
    )
    with_file(tmp_path / "run")

    failed, passed, code = await checked(settings)

    assert code == 78
    assert {"run folder", "data", "logit columns", "reference", "reward server"} <= failed.keys()
    assert {"model", "disk space", "policy server", "tokenizer", "context"} <= passed.keys()


async def test_of_several_policy_servers_one_that_answers_is_enough_wherever_it_is_named(
    servers: Servers, tmp_path: Path
) -> None:
    addresses = f"127.0.0.1:1,{servers.policy()}"

    failed, passed, code = await checked(servers.settings(tmp_path / "run", policy_server=addresses, check_patience=10))

    assert (failed, code) == ({}, 0)
    assert passed["replicas"] == "1 of 2 can take the weights; when they come, the same is asked of 127.0.0.1:1"
    assert passed.keys() == set(CHECKS)


async def test_every_policy_server_that_answers_is_checked(servers: Servers, tmp_path: Path) -> None:
    other = other_model(servers, "wider", vocab=300)
    addresses = f"{servers.policy()},{other}"

    failed, _, code = await checked(servers.settings(tmp_path / "run", policy_server=addresses))

    assert code == 78
    assert f"policy server {other} has 300 logit columns" in " ".join(failed.values())


async def test_another_reference_passes_when_it_is_meant(servers: Servers, tmp_path: Path) -> None:
    other = other_model(servers, "other weights", seed=7)

    failed, passed, code = await checked(servers.settings(tmp_path / "run", policy_server=other, other_reference=True))

    assert (failed, code) == ({}, 0)
    assert "as --other-reference says" in passed["reference"]
    assert "log-probabilities" not in passed, "nothing that is served is the run's"


async def test_half_precision_is_within_its_own_limit(servers: Servers, tmp_path: Path) -> None:
    served = servers.policy("16 bits", "--dtype", "bfloat16")

    failed, passed, _ = await checked(servers.settings(tmp_path / "run", policy_server=served))

    assert not failed
    assert "(limit 0.1)" in passed["log-probabilities"]


def test_a_start_fails_like_the_check_and_leaves_the_folder_free(servers: Servers, tmp_path: Path) -> None:
    settings = servers.settings(tmp_path / "run", policy_server=other_model(servers, "wider", vocab=300))

    started = trainer(settings)

    assert started.returncode == 78
    assert "300 logit columns, the trainer's --model 257: start it with the same --model" in started.stderr
    assert "Traceback" not in started.stderr
    assert files(tmp_path) == {"run", "run/.lock"}


def test_other_log_probabilities_after_the_first_publish_stop_a_run_before_its_first_step(
    servers: Servers, tmp_path: Path
) -> None:
    served = servers.policy_process("managed in 16 bits", "--dtype", "bfloat16")
    settings = servers.settings(tmp_path / "run", policy_server=served.address, max_logprob_gap=1e-6, eval_prompts=0)

    started = trainer(settings)

    assert started.returncode == 78
    assert "Serve in float32 (--dtype)" in started.stderr
    assert "Traceback" not in started.stderr
    assert published(served) == 1
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "run" / "checkpoints").exists()


async def test_a_managed_server_is_compared_by_digest_before_the_first_publish(
    servers: Servers, tmp_path: Path
) -> None:
    process = servers.start_managed()

    failed, passed, code = await checked(servers.settings(tmp_path / "run", policy_server=process.address))

    assert (failed, code) == ({}, 0)
    assert passed["reference"] == "the policy server's, the model that the run starts from"
    assert "log-probabilities" not in passed
