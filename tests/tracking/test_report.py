"""The report of rewards over the KL: what a run's metrics become, and which rewards were over-optimised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import UserError
from engine.tracking.report import over_optimised, reward_parts, reward_report

STEPS = 40


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(gold: list[float], total: list[float] | None = None, noise: float = 0.02, **more: float) -> list[dict]:
    """One row per step; the total rises unless it is given."""
    random = np.random.default_rng(0)
    total = total or [i / len(gold) for i in range(len(gold))]
    rows = []
    for i, (one, other) in enumerate(zip(gold, total, strict=True)):
        around = random.normal(size=2) * noise
        row = {"step": i + 1, "reward/mean": other + around[0], "reward/gold/mean": one + around[1], "reward/std": 9.0}
        rows.append(row | {"policy/kl_per_sample": i / 10} | more)
    return rows


def arch(peak: float = 1.0) -> list[float]:
    """Up to the middle of a run, and down again."""
    return [peak * min(i, STEPS - i) / (STEPS / 2) for i in range(STEPS)]


def shown(folder: Path) -> tuple[list[list[str]], list[str]]:
    """Cells of the table by rows, the head first, and the sentences."""
    table, sentences = reward_report(folder)
    columns = [[str(column.header), *column.cells] for column in table.columns]
    return [[str(cell) for cell in row] for row in zip(*columns, strict=True)], sentences


def test_planted_over_optimisation_is_found_at_its_peak(tmp_path):
    rows, sentences = shown(write(tmp_path, run(arch())))
    assert rows[0] == ["steps", "sqrt(KL)", "total", "gold"]
    assert [row[0] for row in rows[1:]] == [f"{i}-{i + 3}" for i in range(1, STEPS, 4)]
    [sentence] = sentences
    [best] = over_optimised(reward_parts(tmp_path)).values()
    assert best.first in (17, 21)
    assert sentence.startswith(f"gold was over-optimised: highest in steps {best.first}-{best.last} (")
    assert sentence.count("sqrt(KL)") == 2


@pytest.mark.parametrize(
    ("gold", "total"),
    [
        ([i / STEPS for i in range(STEPS)], None),
        ([0.5] * STEPS, None),
        (arch(), arch()),
        (arch(peak=0.001), None),
    ],
    ids=["it rises", "it stays", "the total falls too", "it falls within the noise"],
)
def test_a_clean_run_has_none(tmp_path, gold, total):
    assert shown(write(tmp_path, run(gold, total)))[1] == []


def test_a_fall_counts_when_it_is_three_standard_errors_deep(tmp_path):
    """Two steps a part, 0.1 above and below its mean: standard error 0.1, of a difference 0.141."""
    for fall, found in ((0.45, True), (0.4, False)):
        means = [0.0, 1.0, 1.0 - fall]
        gold = [mean + sign for mean in means for sign in (0.1, -0.1)]
        write(tmp_path, run(gold, noise=0))
        assert bool(over_optimised(reward_parts(tmp_path))) == found


def test_cells_are_the_mean_and_its_standard_error(tmp_path):
    rows = [
        {"step": step, "reward/mean": total, "reward/a/b/mean": part, "policy/kl_per_sample": kl}
        for step, total, part, kl in [(1, 1, 0.5, 4), (2, 2, 0.5, 4), (3, 3, None, 9.5), (7, 5, 1, 8.5)]
    ]
    assert shown(write(tmp_path, rows))[0] == [
        ["steps", "sqrt(KL)", "total", "a/b"],
        ["1-2", "2.00", "1.500 ± 0.500", "0.500 ± 0.000"],
        ["3-7", "3.00", "4.000 ± 1.000", "1.000 ± 0.000"],
    ]


@pytest.mark.parametrize("kl", [None, "absent"])
def test_a_run_that_measured_no_kl_is_reported_without_it(tmp_path, kl):
    rows = [row | {"policy/kl_per_sample": None} for row in run(arch())]
    if kl == "absent":
        rows = [{k: v for k, v in row.items() if k != "policy/kl_per_sample"} for row in rows]
    cells, [sentence] = shown(write(tmp_path, rows))
    assert {row[1] for row in cells[1:]} == {"?"}
    assert "sqrt(KL) ?" in sentence
    assert "nan" not in str(cells) + sentence


def test_an_estimate_of_the_kl_below_0_is_shown_as_0(tmp_path):
    rows = [row | {"policy/kl_per_sample": -0.1} for row in run([0.5] * 4)]
    assert [row[1] for row in shown(write(tmp_path, rows))[0][1:]] == ["0.00", "0.00"]


def test_a_reward_that_a_part_lacks_leaves_its_cell_empty_there(tmp_path):
    rows = run([0.5] * 4)
    for row in rows[:2]:
        del row["reward/gold/mean"]
    cells = [row[3] for row in shown(write(tmp_path, rows))[0]]
    assert cells[:2] == ["gold", ""]
    assert cells[2].startswith("0.5")


def test_rows_that_are_no_steps_and_lines_that_are_not_whole_are_passed_over(tmp_path):
    rows = run(arch())
    before = reward_parts(write(tmp_path, rows))
    write(tmp_path, [{"step": 0, "eval/reward/mean": 1.0}, *rows, {"step": 41, "reward/mean": None}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 42, "reward/me')
    assert reward_parts(tmp_path) == before


@pytest.mark.parametrize(("steps", "parts"), [(2, 1), (3, 1), (4, 2), (19, 9), (20, 10), (1000, 10)])
def test_a_part_has_two_steps_at_least_and_there_are_ten_at_most(tmp_path, steps, parts):
    found = reward_parts(write(tmp_path, run([0.5] * steps)))
    assert len(found) == parts
    assert (found[0].first, found[-1].last) == (1, steps)


@pytest.mark.parametrize(
    "rows", [None, [], [{"step": 1, "train/nll": 2.0}, {"step": 2, "train/nll": 1.9}], [{"step": 1, "reward/mean": 1}]]
)
def test_a_folder_without_steps_of_an_rl_run_is_told(tmp_path, rows):
    if rows is not None:
        write(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        reward_report(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: holds no steps of a run with rewards; give the folder of an `rl`")


def test_the_alarms_of_the_run_are_told_behind_the_table(tmp_path):
    write(tmp_path, run([0.5] * STEPS))
    events = [{"kind": "run_started"}, {"kind": "alarm", "step": 20, "alarm": "length_drift", "text": "too long"}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert shown(tmp_path)[1] == ["alarm length_drift, step 20: too long"]
