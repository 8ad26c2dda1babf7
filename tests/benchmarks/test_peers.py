"""The parts of the comparison with TRL that only compute: rows, records, FLOPs, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks.efficiency import anatomies, arithmetic, report
from benchmarks.peers import flops, measure, rewards
from benchmarks.peers.gnomon_side import configuration, from_rows
from benchmarks.peers.measure import Usage, Watch, quiet
from benchmarks.peers.record import Run, Step, reached, seconds_to, speed
from benchmarks.peers.tables import Spread, comparison, ratios, shown, table
from benchmarks.peers.trl_side import settings_of
from benchmarks.peers.workloads import SEED, WORKLOADS, write_rows
from engine.config import Config
from engine.data.sampler import RowSampler

TINY = flops.Shape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocabulary=10)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(seconds: list[float], rewards: list[float | None] | None = None) -> tuple[Step, ...]:
    ends = [sum(seconds[: i + 1]) for i in range(len(seconds))]
    seen = rewards or [None] * len(seconds)
    return tuple(
        Step(end - s, end, samples=4, trained_tokens=40, generated_tokens=12, reward=r)
        for end, s, r in zip(ends, seconds, seen, strict=True)
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_sides_train_the_same_rows_in_the_same_order(name, tmp_path):
    workload = WORKLOADS[name]
    ours, theirs = write_rows(workload, tmp_path)
    given, drawn = lines(ours), RowSampler(workload.steps * workload.rows_per_step, seed=SEED)
    in_order = [given[i] for _ in range(workload.steps) for i in drawn.next(workload.rows_per_step)]
    assert in_order == lines(theirs)
    assert workload.rows == given, "made anew they are the same"


@pytest.mark.parametrize("name", WORKLOADS)
def test_both_sides_are_given_the_same_sizes(name, tmp_path):
    workload = WORKLOADS[name]
    raw = configuration(workload, model="models/any", rows=tmp_path / "rows.jsonl", folder=tmp_path, threads=2)
    ours, theirs = Config.model_validate(raw), settings_of(workload)
    assert (ours.optimizer.learning_rate, ours.optimizer.betas) == (theirs["learning_rate"], (0.9, 0.95))
    assert (ours.optimizer.weight_decay, ours.optimizer.max_grad_norm) == (theirs["weight_decay"], 1.0)
    assert ours.optimizer.schedule == theirs["lr_scheduler_type"]
    assert ours.model.gradient_checkpointing == theirs["gradient_checkpointing"]
    if workload.kind == "grpo":
        assert ours.rl.prompts_per_step * ours.rl.samples_per_prompt == theirs["per_device_train_batch_size"]
        assert (ours.rl.steps, ours.rollout.max_new_tokens) == (theirs["max_steps"], theirs["max_completion_length"])
        assert (ours.updates_per_step, ours.algorithm.kl_coef) == (theirs["num_iterations"], theirs["beta"])
    else:
        assert (ours.training.updates, ours.training.rows_per_update) == (
            theirs["max_steps"],
            theirs["per_device_train_batch_size"],
        )


def test_lengths_of_offline_rows_are_skewed():
    words = [len(row["completion"].split()) for row in replace(WORKLOADS["sft-135m"], steps=40).rows]
    mean, longest = sum(words) / len(words), max(words)
    assert sorted(words)[len(words) // 2] == pytest.approx(40, rel=0.15)
    assert 45 < mean < 75
    assert longest > 4 * mean


def test_rewards_take_what_both_sides_give():
    assert rewards.share_of_e(["eel", "", "fox"], prompts=["p"] * 3, answer=["x"] * 3) == [2 / 3, 0.0, 0.0]
    assert rewards.right_answer([" 4\n2 + 2", "5"], answer=["4", "4"], prompts=[]) == [1.0, 0.0]


def test_the_warm_up_is_left_out_and_rates_are_totals():
    measured = speed(steps([9.0, 1.0, 3.0, 4.0]), warmup=1)
    assert measured.step_s == 3.0
    assert measured.samples_per_s == 12 / 8
    assert measured.generated_per_s == 36 / 8
    assert measured.trained_per_s == 120 / 8
    with pytest.raises(ValueError, match="none is left"):
        speed(steps([1.0]), warmup=1)


def test_time_to_a_target_counts_from_the_start_of_training():
    run = Run("gnomon", started_at=-20.0, training_at=-2.0, steps=steps([1.0] * 5, [0.0, 0.9, 0.1, 0.6, 0.8]))
    assert seconds_to(run, 0.5, window=2) == 2.0 + 3.0
    assert seconds_to(run, 0.7, window=2) == 2.0 + 5.0
    assert seconds_to(run, 0.9, window=2) is None
    assert (reached(run.steps, 0.5, window=2), reached(run.steps, 0.9, window=2)) == (3, None)


def test_a_record_survives_being_written(tmp_path):
    run = Run("trl", 1.0, 2.0, steps([1.0, 2.0], [0.5, None]), settings={"beta": 0.0})
    run.write(tmp_path / "record.json")
    assert Run.read(tmp_path / "record.json") == run


def test_gnomons_steps_are_cut_at_their_first_phase():
    events = [
        {"kind": "training", "time": 90.0},
        {"kind": "phase", "time": 100.0, "step": 1, "phase": "rollout"},
        {"kind": "phase", "time": 103.0, "step": 1, "phase": "update"},
        {"kind": "phase", "time": 110.0, "step": 2, "phase": "rollout"},
    ]
    row = {"rollout/tokens": 100.0, "rollout/response_length": 2.0, "reward/mean": 0.5}
    times = {"time/rollout": 3.0, "time/update": 5.0, "time/publish": 1.0, "time/publish_pack": 0.5, "time/step": 9.5}
    metrics = [{"step": 1} | row | times, {"step": 2} | row | times | {"time/step": 9.0}]
    run = from_rows(WORKLOADS["grpo-tiny"], metrics, events, 80.0, {})
    first, second = run.steps
    assert (first.seconds, second.seconds) == (10.0, 9.0)
    assert (first.trained_tokens, first.generated_tokens) == (100, 2 * 64)
    assert first.phases["controller"] == 0.5
    assert first.phases["between steps"] == 0.5
    assert (run.training_at, run.reference_s) == (90.0, 0.0)
    # Of a preference run what lies before the first step is the reference's pass.
    assert from_rows(WORKLOADS["dpo-tiny"], metrics, events, 80.0, {}).reference_s == 10.0


def test_cores_are_cpu_seconds_over_the_span():
    watch = Watch([Usage(float(t), {"Policy": 1.5 * t}, 1.75 * t) for t in range(5)])
    assert watch.cores(1.0, 3.0) == {"Policy": 1.5, "others": 0.25}
    assert watch.cores(2.0, 2.0) == {}


def test_memory_is_weighed_where_resident_sizes_have_grown(monkeypatch):
    watch, root = Watch(), psutil.Process()
    watch.sample(root)
    assert 0 < watch.uss <= watch.pss
    weighed = []
    monkeypatch.setattr(measure, "tree", lambda root: [root])
    for size in (2**40, 1.005 * 2**40, 2**39, 2**41):
        monkeypatch.setattr(Watch, "_weigh", lambda self, processes, size=size: weighed.append(size))
        monkeypatch.setattr(psutil.Process, "memory_info", lambda self, size=size: SimpleNamespace(rss=size))
        watch.sample(root)
    assert weighed == [2**40, 2**41]


def test_a_machine_that_others_use_is_told_of():
    assert quiet([{"Policy": 1.9, "others": 0.04}, {}])
    assert not quiet([{"Policy": 1.9, "others": 0.04}, {"Policy": 1.0, "others": 0.3}])


def test_flops_are_those_of_the_matrices():
    attention, feed_forward = 8 * 8 + 2 * 8 * 4 + 8 * 8, 3 * 8 * 16
    assert TINY.body == 2 * (attention + feed_forward)
    assert TINY.output == 80
    # Two sequences of one token and two responses, which see 1 + 2 + 3 tokens; 4 numbers per head and pair, twice.
    once = 2 * TINY.body * 6 + 2 * 80 * 4 + 2 * (1 + 2 + 3) * 4 * 8 * 2
    sizes = {"prompts": 2, "prompt_len": 1, "samples": 2, "response_len": 2}
    assert flops.forward(TINY, **sizes) == once
    assert flops.training(TINY, **sizes) == flops.Training(useful=3 * once, recompute=2 * 80 * 4)


def test_a_prompt_is_computed_once_for_all_its_samples():
    made = flops.forward(TINY, prompts=1, prompt_len=3, samples=4, response_len=2)
    seen = (1 + 2 + 3) + 4 * (4 + 5)
    assert made == 2 * TINY.body * (3 + 4 * 2) + 2 * TINY.output * 8 + 4 * seen * 8 * 2


def test_spreads_and_ratios_of_pairs():
    assert str(Spread.of([3.0, 1.0, 2.0])) == "2.00 (1.00..3.00)"
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123")]
)
def test_numbers_are_shown_with_three_digits(value, text):
    assert shown(value) == text


def test_a_table_is_aligned_markdown():
    assert table(["a", "bb"], [["ccc", "d"]]).splitlines() == ["| a   | bb |", "|-----|----|", "| ccc | d  |"]


def test_runs_without_a_value_are_told():
    drawn = comparison({"s to the target": ([10.0, None, 12.0], [20.0, 30.0, None]), "loss": ([1.0], [0.0])})
    assert "11.0 (10.0..12.0), 1 of 3 never" in drawn
    assert "0.500 (0.500..0.500)" in drawn, "the one pair that has both"
    assert drawn.splitlines()[-1].endswith("| -                    |"), "no ratio to nothing"


def anatomy_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    times = {"time/rollout": 4.0, "time/update": 5.0, "time/publish": 0.5, "time/publish_pack": 0.2, "time/step": 10.0}
    sizes = {"rollout/tokens": 80.0, "rollout/prompts": 2.0, "rollout/response_length": 6.0}
    metrics = [{"step": 0, "eval/reward": 0.1}, *({"step": n} | times | sizes for n in (1, 2))]
    events = [{"kind": "note", "time": 0.0}]
    for number, start in ((1, 100.0), (2, 112.0)):
        events += [
            {"kind": "phase", "time": start + after, "step": number, "phase": phase}
            for phase, after in (("rollout", 0.0), ("score", 3.0), ("update", 4.2), ("publish", 9.4))
        ]
    return metrics, events


def test_what_no_actor_does_is_the_controllers():
    first, second = anatomies(*anatomy_rows())
    assert dict(first.parts) == {"generate": 3.0, "score": 1.0, "update": 5.0, "publish": 0.5}
    assert (first.whole, second.whole) == (12.0, 10.0)
    assert (first.controller, second.controller) == (2.5, 0.5)
    assert "controller: no actor is waited for | 1.50 (0.500..2.50)          | 13.6%" in report([first, second])


def test_the_arithmetic_of_a_runs_phases(tmp_path):
    raw = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_key_value_heads": 1, "vocab_size": 10}))
    config = {
        "stage": "rl",
        "model": {"path": str(tmp_path)},
        "rl": {"samples_per_prompt": 4, "epochs_per_step": 1},
    }
    metrics, events = anatomy_rows()
    shares = arithmetic(config, metrics, anatomies(metrics, events), peak=1e3)
    sizes = {"prompts": 2, "prompt_len": 4, "samples": 8, "response_len": 6}
    made, work = flops.forward(TINY, **sizes), flops.training(TINY, **sizes)
    assert shares["generate"] == pytest.approx(made / 3.0 / 1e3)
    assert shares["update"] == pytest.approx(work.useful / 5.0 / 1e3)
