"""`gnomon simulate`: what it prints, and what it says of wrong options."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from engine.cli import USER_ERROR, main
from tests.simulation.recorded import raw_config, write_run
from tests.simulation.scenarios import COSTS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw_config()))
    (tmp_path / "costs.json").write_text(json.dumps(asdict(COSTS)))
    return path


class Outcome:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def simulate(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def command(*options: str) -> Outcome:
        monkeypatch.chdir(config.parent)
        monkeypatch.setattr("sys.argv", ["gnomon", "simulate", "run.yaml", *options])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Outcome(int(end.value.code or 0), printed.out, printed.err)

    return command


USUAL = ("--costs", "costs.json", "--lengths", "lognormal:300:1.0", "--steps", "4")


def test_every_combination_is_a_line(simulate) -> None:
    found = simulate(
        *USUAL, "--accelerators", "4,8", "--trainers", "0.25,0.5", "--max-staleness", "0,2", "--price", "2"
    )
    assert found.code == 0, found.err
    lines = [line.split() for line in found.out.splitlines()]
    rows = [line for line in lines if line and line[0] in ("4", "8")]
    assert len(rows) == 2 * (1 + 2 * 2)
    assert rows[0][1:4] == ["turns", "0", rows[0][3]]
    assert rows[1][1:3] == ["3+1", "0"]
    assert "decisions per second, 8 accelerators: Admission" in found.out


def test_a_program_gets_the_same_as_json(simulate) -> None:
    found = json.loads(simulate(*USUAL, "--max-staleness", "1", "--price", "2", "--json").out)
    assert found["costs"] == asdict(COSTS)
    turns, ahead = found["runs"]
    assert (ahead["accelerators"], ahead["engines"], ahead["trainers"]) == (4, 2, 2), "the configuration's own"
    assert ahead["speedup_over_turns"] == pytest.approx(turns["step_seconds"] / ahead["step_seconds"])
    assert ahead["speedup_over_separate"] is None, "staleness 0 was not asked for"
    assert ahead["cost"] == pytest.approx(2 * ahead["accelerator_hours"])
    assert ahead["samples"] == {"admitted": 96, "trained": 96, "dropped": {}, "in_flight": 0}


def test_prompts_grow_with_the_accelerators_where_that_is_wanted(simulate) -> None:
    options = (*USUAL, "--accelerators", "4,16", "--max-staleness", "0", "--json")
    same, grown = (json.loads(simulate(*options, *more).out)["runs"] for more in ((), ("--grow",)))
    assert [run["samples"]["trained"] for run in same] == [96, 96, 96, 96]
    assert [run["samples"]["trained"] for run in grown] == [96, 96, 384, 384]


def test_failures_are_shown_with_what_they_cost(simulate) -> None:
    failing = ("--failures", "20", "--restart", "1", "ray.stop_after_incidents=1000")
    found = simulate(*USUAL, *failing, "--accelerators", "32")
    assert found.code == 0, found.err
    assert "failed" in found.out
    stopped = simulate(*USUAL, *failing[:4], "ray.stop_after_incidents=0", "--accelerators", "32")
    assert "in turns: stopped after" in stopped.out
    runs = json.loads(simulate(*USUAL, *failing, "--accelerators", "32", "--json").out)["runs"]
    assert sum(run["engine_failures"] + run["trainer_failures"] for run in runs) > 0


def test_lengths_and_costs_come_from_runs(simulate, config: Path) -> None:
    for i, mean in enumerate((200, 500)):
        write_run(config.parent / f"run{i}", COSTS, mean=mean, seed=i)
    found = simulate("--lengths", "run0", "--calibrate", "run0", "--calibrate", "run1", "--max-staleness", "0")
    assert found.code == 0, found.err
    assert "prompts of 52 tokens" in found.out
    assert found.out.count("s/step predicted") == 2


def with_costs(**changes: object) -> str:
    return json.dumps(asdict(COSTS) | changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--lengths: is required"),
        (("--lengths", "fixed:9"), "--costs: cannot be estimated"),
        (("--costs", "costs.json", "--calibrate", "run0", "--lengths", "fixed:9"), "give one of them"),
        (("--costs", "no.json", "--lengths", "fixed:9"), "no.json cannot be read"),
        (("--costs", "negative.json", "--lengths", "fixed:9"), "update_s must be seconds, 0 or more, not -1"),
        (("--costs", "short.json", "--lengths", "fixed:9"), "must hold exactly the keys decode_step_s"),
        ((*USUAL, "--lengths", "lognormal:-3:1"), "--lengths: 'lognormal:-3:1' is neither"),
        ((*USUAL, "--lengths", "no_such_run"), "--lengths: 'no_such_run' is neither a folder that is there"),
        ((*USUAL, "--lengths", "."), "has no event `consumed`"),
        ((*USUAL, "--accelerators", "8,many"), "--accelerators: '8,many' must be whole numbers above 0"),
        ((*USUAL, "--trainers", "1.5"), "--trainers: '1.5' must be numbers above 0 and below 1"),
        ((*USUAL, "--max-staleness", "-2"), "--max-staleness: '-2' must be whole numbers"),
        ((*USUAL, "--failures", "1"), "--restart: is required with --failures"),
        ((*USUAL, "stage=sft"), "only one stage with stage: rl can be simulated"),
    ],
)
def test_a_wrong_option_is_one_clear_message(simulate, config: Path, options: tuple[str, ...], message: str) -> None:
    (config.parent / "negative.json").write_text(with_costs(update_s=-1))
    (config.parent / "short.json").write_text('{"update_s": 1.0}')
    found = simulate(*options)
    assert found.code == USER_ERROR
    assert message in found.err
    assert found.err.startswith("error: ")
