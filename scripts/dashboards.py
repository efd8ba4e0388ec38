"""The Grafana dashboards, as tables of panels; scripts/monitoring.py writes them to k8s/monitoring/dashboards."""

from __future__ import annotations

from grafana import Dashboard, Panel, Variable


def quantiles(histogram: str, selector: str, *, by: str = "") -> list[tuple[str, str]]:
    """The median and the slow hundredth of a histogram; `by` names a label that tells curves apart."""
    labels = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    rates = f"sum by ({labels}) (rate({histogram}_bucket{{{selector}}}[$__rate_interval]))"
    return [
        (f"histogram_quantile({share}, {rates})", f"{legend}{said}")
        for share, said in ((0.5, "median"), (0.99, "99 %"))
    ]


def mean(histogram: str, selector: str, *, by: str = "") -> str:
    """The mean of what a histogram saw; `by` names labels that tell curves apart."""
    total = f"sum by ({by})" if by else "sum"
    sums, counts = (f"{total} (rate({histogram}_{part}{{{selector}}}[$__rate_interval]))" for part in ("sum", "count"))
    return f"{sums} / {counts}"


def rate(counter: str, selector: str, by: str) -> str:
    """How fast a counter rises, by a label."""
    return f"sum by ({by}) (rate({counter}{{{selector}}}[$__rate_interval]))"


_T = 'instance=~"$instance"'
_RUN = Variable("run", "label_values(rlhf_trainer_run_info, run_id)", several=False)


def _last(name: str) -> str:
    """A statistic of the trainer's last step; a run has one trainer at a time, so restarts continue a curve."""
    return f"max(rlhf_trainer_{name}{{{_T}}})"


TRAINING = Dashboard(
    uid="rlhf-training",
    title="RLHF / Training",
    variables=[
        _RUN,
        Variable("instance", 'label_values(rlhf_trainer_run_info{run_id="$run"}, instance)'),
    ],
    rows=[
        (
            "Where the run is",
            [
                Panel(
                    "Step",
                    [(_last("step"), "done"), (_last("steps_planned"), "planned")],
                    kind="stat",
                    width=5,
                    height=4,
                ),
                Panel(
                    "Waiting for",
                    [(f"max by (on) (rlhf_trainer_waiting{{{_T}}})", "{{on}}")],
                    description="1 while the run can't go on because of that server.",
                    kind="stat",
                    width=5,
                    height=4,
                ),
                Panel("Weights version", [(_last("weights_version"), "published")], kind="stat", width=4, height=4),
                Panel("Starts of the trainer", [(_last("incarnation"), "starts")], kind="stat", width=5, height=4),
                Panel(
                    "Age of the newest checkpoint",
                    [(f"time() - {_last('checkpoint_timestamp_seconds')}", "age")],
                    unit="s",
                    description="What would be lost if the trainer were lost now.",
                    kind="stat",
                    width=5,
                    height=4,
                ),
            ],
        ),
        (
            "What the policy learns: look at all four together",
            [
                Panel(
                    "Reward",
                    [(_last("reward_mean"), "training"), (_last("evaluation_reward_mean"), "held out")],
                    description="Mean over judged completions.",
                    width=6,
                ),
                Panel(
                    "KL from the reference",
                    [
                        (_last("objective_kl"), "training"),
                        (_last("evaluation_kl_mean"), "held out"),
                        (_last("kl_target"), "target"),
                    ],
                    description="Nats per completion.",
                    width=6,
                ),
                Panel(
                    "Distinct completions",
                    [
                        (_last("rollout_distinct_fraction"), "training"),
                        (_last("evaluation_distinct_fraction"), "held out"),
                    ],
                    unit="percentunit",
                    description="When this falls while reward rises, the policy has found one phrase.",
                    width=6,
                ),
                Panel(
                    "Length of completions",
                    [(_last("rollout_length_mean"), "training"), (_last("evaluation_length_mean"), "held out")],
                    description="Tokens.",
                    width=6,
                ),
            ],
        ),
        (
            "How PPO is doing",
            [
                Panel(
                    "Losses",
                    [(_last(f"ppo_loss_{part}"), part) for part in ("policy", "value", "total")],
                ),
                Panel(
                    "Clipped",
                    [(_last("ppo_policy_clipfrac"), "policy"), (_last("ppo_val_clipfrac"), "value")],
                    unit="percentunit",
                    description="Share of tokens whose ratio, or value, the clip holds back.",
                ),
                Panel("KL coefficient", [(_last("objective_kl_coef"), "β")]),
                Panel("Entropy", [(_last("ppo_policy_entropy"), "policy")], description="Nats per token."),
                Panel(
                    "Explained variance",
                    [(_last("ppo_val_var_explained"), "value head")],
                    description="Of the returns, by the value head; 0 = no better than their mean.",
                ),
                Panel(
                    "Log-probabilities, trainer against policy server",
                    [
                        (_last("rollout_logprob_gap_mean"), "mean gap"),
                        (_last("rollout_logprob_gap_max"), "largest gap"),
                        (_last("logprob_gap_limit"), "limit of the mean"),
                    ],
                    description="Nats per token; the ratios of PPO are off by as much.",
                ),
            ],
        ),
        (
            "Where time and samples go",
            [
                Panel(
                    "Time by phase",
                    [(rate("rlhf_trainer_phase_seconds_sum", _T, "phase"), "{{phase}}")],
                    unit="percentunit",
                    description="Share of the time.",
                ),
                Panel("Completion tokens per second", [(_last("tokens_per_second"), "last step")]),
                Panel(
                    "Samples per second",
                    [
                        (f"sum(rate(rlhf_trainer_samples_trained_total{{{_T}}}[$__rate_interval]))", "trained"),
                        (
                            rate("rlhf_trainer_samples_dropped_total", _T, "reason, code"),
                            "dropped: {{reason}} {{code}}",
                        ),
                    ],
                ),
                Panel(
                    "Disk of the run's folder",
                    [
                        (_last("run_dir_free_bytes"), "free"),
                        (_last("checkpoint_bytes"), "one checkpoint"),
                    ],
                    unit="bytes",
                ),
                Panel(
                    "Checkpoints",
                    [(f"sum(rlhf_trainer_checkpoints_total{{{_T}}})", "written")],
                    description="By the process that runs.",
                ),
            ],
        ),
    ],
)

_GENERATE = f'{_T}, grpc_service="rlhf.policy.v1.PolicyService"'
_CALLS = "grpc_server_handling_seconds"

ROLLOUT = Dashboard(
    uid="rlhf-rollout",
    title="RLHF / Rollout",
    variables=[
        Variable("run", "label_values(rlhf_policy_weights_info, run_id)"),
        Variable("instance", 'label_values(rlhf_policy_weights_info{run_id=~"$run"}, instance)'),
    ],
    rows=[
        (
            "Load",
            [
                Panel(
                    "Requests that wait",
                    [
                        (f"sum by (instance, kind) (rlhf_policy_queued_requests{{{_T}}})", "{{instance}} {{kind}}"),
                        (f"max(rlhf_policy_queue_limit_requests{{{_T}}})", "limit"),
                    ],
                    description="At the limit calls are refused with RESOURCE_EXHAUSTED.",
                ),
                Panel("Completions that run", [(f"rlhf_policy_running_completions{{{_T}}}", "{{instance}}")]),
                Panel(
                    "Memory of key-value caches",
                    [
                        (f"rlhf_policy_cache_bytes{{{_T}}}", "{{instance}}"),
                        (f"rlhf_policy_cache_limit_bytes{{{_T}}}", "{{instance}} limit"),
                    ],
                    unit="bytes",
                ),
                Panel("Tokens per second", [(rate("rlhf_policy_tokens_total", _T, "phase"), "{{phase}}")]),
                Panel(
                    "Completions per second",
                    [
                        (rate("rlhf_policy_completions_total", _T, "finish_reason"), "{{finish_reason}}"),
                        (
                            f"sum(rate(rlhf_policy_cancelled_completions_total{{{_T}}}[$__rate_interval]))",
                            "caller went away",
                        ),
                    ],
                ),
                Panel(
                    "Calls by answer",
                    [
                        (
                            rate("grpc_server_handled_total", _GENERATE, "grpc_method, grpc_code"),
                            "{{grpc_method}} {{grpc_code}}",
                        )
                    ],
                    unit="reqps",
                ),
            ],
        ),
        (
            "Latency",
            [
                Panel("Calls", quantiles(_CALLS, _GENERATE, by="grpc_method"), unit="s"),
                Panel(
                    "First token of a stream",
                    quantiles("rlhf_policy_first_message_seconds", _T),
                    unit="s",
                    description="From the arrival of a streaming request.",
                ),
                Panel(
                    "Between tokens of a stream",
                    quantiles("rlhf_policy_token_interval_seconds", _T),
                    unit="s",
                ),
                Panel("Decode step", quantiles("rlhf_policy_decode_step_seconds", _T), unit="s"),
                Panel(
                    "Completions in a decode step",
                    [(mean("rlhf_policy_decode_step_rows", _T), "mean")],
                    description="How well decoding is shared.",
                ),
            ],
        ),
        (
            "Weights",
            [
                Panel("Live version", [(f"rlhf_policy_weights_version{{{_T}}}", "{{instance}}")]),
                Panel(
                    "Updates",
                    [
                        (
                            f"sum by (outcome) (increase(rlhf_policy_weights_updates_total{{{_T}}}[$__rate_interval]))",
                            "{{outcome}}",
                        )
                    ],
                ),
                Panel(
                    "Standstill for a swap",
                    [(mean("rlhf_policy_weights_swap_seconds", _T), "mean")],
                    unit="s",
                ),
                Panel(
                    "Transfer of an update",
                    quantiles(_CALLS, f'{_T}, grpc_method="UpdateWeights"'),
                    unit="s",
                ),
                Panel(
                    "Memory for updates", [(f"rlhf_policy_weights_staged_bytes{{{_T}}}", "{{instance}}")], unit="bytes"
                ),
            ],
        ),
    ],
)

# The reward that is served, rather than the components of a composite.
_SERVED = f'{_T}, component=""'

REWARDS = Dashboard(
    uid="rlhf-rewards",
    title="RLHF / Rewards",
    variables=[
        Variable("instance", "label_values(rlhf_reward_queue_limit_samples, instance)"),
        _RUN,
    ],
    rows=[
        (
            "What is given",
            [
                Panel(
                    "Rewards",
                    [(rate("rlhf_reward_value_bucket", _SERVED, "le"), "{{le}}")],
                    kind="heatmap",
                    description="Their distribution as time passes.",
                ),
                Panel(
                    "Reward by component",
                    quantiles("rlhf_reward_value", _T, by="component"),
                    description="Median and best hundredth, as the histogram has them; no name = what is served.",
                ),
                Panel(
                    "Outcomes per second",
                    [(rate("rlhf_reward_outcomes_total", _SERVED, "outcome, code"), "{{outcome}} {{code}}")],
                ),
                Panel(
                    "Components, as the trainer sees them",
                    [
                        (
                            "max by (name) (rlhf_trainer_reward_component * on (namespace, job, instance) "
                            'group_left () rlhf_trainer_run_info{run_id="$run"})',
                            "{{name}}",
                        )
                    ],
                    description="Means of the last step.",
                ),
            ],
        ),
        (
            "How long it takes",
            [
                Panel("A batch", quantiles("rlhf_reward_batch_seconds", _T, by="kind"), unit="s"),
                Panel("A call of Score", quantiles(_CALLS, f'{_T}, grpc_method="Score"'), unit="s"),
                Panel(
                    "Samples in a batch",
                    [(mean("rlhf_reward_batch_samples", _T, by="kind, component"), "{{kind}} {{component}}")],
                ),
                Panel(
                    "Samples that the trainer waits for",
                    [
                        (
                            "max(rlhf_trainer_pending_samples * on (namespace, job, instance) "
                            'group_left () rlhf_trainer_run_info{run_id="$run"})',
                            "pending",
                        )
                    ],
                    description="Without a final reward, evaluations included; what KEDA scales reward servers by.",
                ),
                Panel(
                    "Samples that wait or run",
                    [
                        (f"sum by (kind, component) (rlhf_reward_queue_samples{{{_T}}})", "{{kind}} {{component}}"),
                        (f"max(rlhf_reward_queue_limit_samples{{{_T}}})", "limit"),
                    ],
                    description="At the limit calls are refused with RESOURCE_EXHAUSTED.",
                ),
                Panel(
                    "Batches that run",
                    [(f"sum by (kind, component) (rlhf_reward_running_batches{{{_T}}})", "{{kind}} {{component}}")],
                ),
                Panel(
                    "Samples asked for again per second",
                    [(rate("rlhf_reward_samples_repeated_total", _T, "kind"), "{{kind}}")],
                    description="Remembered, or running for another call: repeated calls cost nothing.",
                ),
                Panel(
                    "Calls by answer",
                    [
                        (
                            rate("grpc_server_handled_total", f'{_T}, grpc_method="Score"', "grpc_code"),
                            "{{grpc_code}}",
                        )
                    ],
                    unit="reqps",
                ),
                Panel(
                    "Servers that a reward asks",
                    [(f"max by (kind, target) (rlhf_reward_circuit_state{{{_T}}})", "{{kind}} {{target}}")],
                    description="0 = called, 1 = one call probes it, 2 = not called, as it kept failing.",
                ),
            ],
        ),
        (
            "People",
            [
                Panel(
                    "Ratings per minute",
                    [
                        (f"60 * sum(rate(rlhf_reward_human_ratings_total{{{_T}}}[$__rate_interval]))", "ratings"),
                        (f"60 * sum(rate(rlhf_reward_human_skips_total{{{_T}}}[$__rate_interval]))", "skips"),
                    ],
                    width=12,
                ),
                Panel(
                    "Oldest open ticket",
                    [(f"max(rlhf_reward_human_oldest_ticket_seconds{{{_T}}})", "age")],
                    unit="s",
                    width=12,
                ),
            ],
        ),
    ],
)

DASHBOARDS = (TRAINING, ROLLOUT, REWARDS)
