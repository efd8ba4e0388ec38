"""PPO over three real processes, on film reviews: `python -m demo` (or `make demo`)."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from demo.corpus import CorpusError, load_reviews
from demo.data import EVALUATION_PROMPTS, HELD_OUT_REVIEWS, split_reviews, write_prompts
from demo.processes import Child, Endpoint, ProcessDiedError, first_to_end, stop_all
from demo.report import Report, ReportError, print_report, write_report
from demo.rewards import RewardError, RewardPlan, needs_ratings, plan_reward

_HERE = Path(__file__).parent
_SILENCE_SECONDS = 20.0
"""After so long a start it is said what is waited for."""
_GRACE_SECONDS = 15.0


class RunFolderError(Exception):
    """The folder for the run's files cannot be used; the message says why."""


@dataclass(frozen=True)
class Plan:
    """What the processes are started with. eval_data None: the trainer holds prompts out of `data` itself."""

    model: str
    data: str
    eval_data: str | None
    reward: RewardPlan
    trainer_config: Path
    extra: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, run, report; the exit status."""
    arguments = _parse(argv)
    console = Console()
    began = time.monotonic()
    run_dir: Path = arguments.run_dir
    try:
        _clear(run_dir)
        plan = _prepare(arguments, console)
        return asyncio.run(_run(plan, run_dir, console, began))
    except (CorpusError, ProcessDiedError, ReportError, RewardError, RunFolderError) as error:
        console.print(f"\nThe demo stopped: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Teach a small language model to praise films, with PPO over three processes.",
        epilog="Anything after -- goes to the trainer, for example: python -m demo -- --steps 50",
    )
    parser.add_argument("--model", help="your own model: a folder or hub name (default: one trained here on reviews)")
    parser.add_argument("--data", help="your own prompts: JSONL, CSV, Parquet or a hub dataset with a column 'prompt'")
    parser.add_argument(
        "--reward",
        default="vader",
        help="what the reward server takes (vader), or one that is set up here: model, composite, remote, go",
    )
    parser.add_argument("--reward-options", help="options of the reward, a JSON or YAML mapping")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="emptied first (runs/demo)")
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="kept between runs (.cache/demo)")
    parser.add_argument("trainer", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _clear(run_dir: Path) -> None:
    """A second run starts fresh; but a folder that no run made is not ours to delete."""
    found = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    if found - {".lock"} and "run.json" not in found:
        raise RunFolderError(f"{run_dir} is not empty, and no earlier run's folder: give another --run-dir")
    shutil.rmtree(run_dir, ignore_errors=True)


def _prepare(arguments: argparse.Namespace, console: Console) -> Plan:
    """Fetch and train whatever the user did not bring."""
    model, data, eval_data = arguments.model, arguments.data, None
    split = None
    if model is None or data is None or needs_ratings(arguments.reward, arguments.reward_options):
        reviews = load_reviews(arguments.cache)
        console.print(f"Corpus: {len(reviews):,} film-review snippets")
        split = split_reviews(reviews, held_out=HELD_OUT_REVIEWS)
        if data is None:
            files = write_prompts(arguments.cache, split, evaluation_prompts=EVALUATION_PROMPTS)
            data, eval_data = str(files.train), str(files.evaluation)
        if model is None:
            # Importing torch takes seconds that a run with a model of one's own need not spend.
            from demo.base_model import Recipe, base_model

            model = str(base_model(arguments.cache, split, Recipe(), console))
    return Plan(
        model=model,
        data=data,
        eval_data=eval_data,
        reward=plan_reward(arguments.reward, arguments.reward_options, arguments.cache, split, console),
        trainer_config=_HERE / ("trainer.yaml" if arguments.model is None else "trainer-own-model.yaml"),
        extra=tuple(arguments.trainer),
    )


async def _run(plan: Plan, run_dir: Path, console: Console, began: float) -> int:
    """Start the three, watch them, report. Whatever happens, none of them outlives this."""
    interrupted = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted.set)
    children: list[Child] = []
    story = asyncio.create_task(_story(plan, run_dir, console, began, children))
    signalled = asyncio.create_task(interrupted.wait())
    try:
        await asyncio.wait([story, signalled], return_when=asyncio.FIRST_COMPLETED)
        if not story.done():
            console.print("\nStopping the three processes …")
            return 130
        report = story.result()
    finally:
        story.cancel()
        signalled.cancel()
        # The trainer first: it still needs the servers for the step it is in.
        await stop_all([child for child in reversed(children) if child.running], _GRACE_SECONDS)
    _say_what_came_out(console, report, run_dir, plan)
    return 0


async def _story(plan: Plan, run_dir: Path, console: Console, began: float, children: list[Child]) -> Report:
    logs = run_dir.with_name(run_dir.name + "-logs")
    logs.mkdir(parents=True, exist_ok=True)
    common = ["--metrics-port", "auto"]
    server = [*common, "--listen", "127.0.0.1:0", "--drain-seconds", "0", "--grace-seconds", "2"]
    environment = _environment()

    reward = await _start_reward(plan.reward, server, logs, environment, children, console)
    policy = await Child.start(
        "policy_server", [*server, "--model", plan.model, "--managed"], folder=logs, environment=environment
    )
    children.append(policy)
    endpoints = {child.name: await _endpoint(child, children, console) for child in (reward, policy)}

    arguments = [*common, "--config", str(plan.trainer_config), "--run-dir", str(run_dir), "--model", plan.model]
    arguments += ["--data", plan.data, *(["--eval-data", plan.eval_data] if plan.eval_data else [])]
    arguments += ["--policy-server", str(endpoints["policy_server"].address)]
    arguments += ["--reward-server", str(endpoints["reward_server"].address)]
    trainer = await Child.start(
        "trainer",
        [*arguments, *plan.extra],
        folder=logs,
        environment=environment,
        echo=True,
        terminal=sys.stdout.isatty() and sys.stderr.isatty(),
    )
    children.append(trainer)
    training_began = time.monotonic()
    endpoints["trainer"] = await _endpoint(trainer, children, console)
    for name, endpoint in endpoints.items():
        places = [f"listens on {endpoint.address}"] if endpoint.address else []
        places += [f"metrics at {endpoint.metrics_url}"] if endpoint.metrics_url else []
        console.print(f"{name:<14} pid {endpoint.pid}: {', '.join(places)}", highlight=False, soft_wrap=True)
    console.print(f"Logs: {logs}\n")

    ended = await first_to_end(children)
    if ended is not trainer or await trainer.wait() != 0:
        raise ProcessDiedError(ended.epitaph())
    now = time.monotonic()
    return write_report(run_dir, seconds=now - began, seconds_training=now - training_began, endpoints=endpoints)


async def _start_reward(
    plan: RewardPlan,
    server: Sequence[str],
    logs: Path,
    environment: Mapping[str, str],
    children: list[Child],
    console: Console,
) -> Child:
    """The server that the trainer asks; one that stands behind it is started first. Both join `children`."""
    if plan.program:
        listen = {**environment, "LISTEN": "127.0.0.1:0"}
        children.append(await Child.start_program("reward_server", plan.program, folder=logs, environment=listen))
        return children[-1]
    arguments = [*server, *plan.arguments]
    if plan.behind:
        behind = await Child.start(
            "reward_server", [*server, *plan.behind], name="reward_server_behind", folder=logs, environment=environment
        )
        children.append(behind)
        target = (await _endpoint(behind, children, console)).address
        arguments += ["--reward-options", f"target: {target}"]
    children.append(await Child.start("reward_server", arguments, folder=logs, environment=environment))
    return children[-1]


async def _endpoint(child: Child, children: Sequence[Child], console: Console) -> Endpoint:
    """Where `child` listens; raises ProcessDiedError when any of them ends first."""
    listening = asyncio.create_task(child.endpoint())
    ended = asyncio.create_task(first_to_end(children))
    try:
        done: set[asyncio.Task[Any]] = set()
        while not done:
            done, _ = await asyncio.wait(
                [listening, ended], timeout=_SILENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                console.print(f"waiting for {child.name} (pid {child.pid}) to start …", highlight=False)
        if listening.done():
            return listening.result()
        raise ProcessDiedError(ended.result().epitaph())
    finally:
        listening.cancel()
        ended.cancel()


def _environment() -> dict[str, str]:
    """Ours; the two model processes work in turns, so idle threads must sleep, not spin on the other's core."""
    return {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", **os.environ}


def _say_what_came_out(console: Console, report: Report, run_dir: Path, plan: Plan) -> None:
    print_report(console, report, run_dir, reward=plan.reward.name)
    python = os.path.relpath(sys.executable)
    trained_at = yaml.safe_load(plan.trainer_config.read_text(encoding="utf-8")).get("temperature")
    temperature = f" --temperature {trained_at}" if trained_at is not None else ""
    console.print(f"\n{run_dir}: report.html, report.json, metrics.jsonl, samples.jsonl, checkpoints/, model/")
    console.print("\nTalk to the tuned policy:", style="bold")
    console.print(
        f"  {python} -m policy_server --model {run_dir / 'model'} --listen 127.0.0.1:50051 &\n"
        f'  {python} -m policy_server.client generate --target 127.0.0.1:50051 "This film is"{temperature}',
        highlight=False,
        soft_wrap=True,
    )
    console.print("Write your own reward:", style="bold")
    console.print(
        "  echo 'def short(completions, **_): return [-len(text) / 100 for text in completions]' > my_reward.py\n"
        "  make demo REWARD=my_reward.py:short",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
