"""The reward contract: both shapes, every kind of value, and settings in the right order."""

from __future__ import annotations

import copy
import fractions
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from engine.config import RewardConfig, RewardsConfig, UserError
from engine.rewards.contract import (
    BUILT_IN,
    Failure,
    Outcome,
    RewardFunction,
    Row,
    Sample,
    Scores,
    resolve,
    resolve_all,
    reward,
)
from engine.rewards.sandbox import protections


def sample(completion: str = "42", prompt: Any = "6 * 7 = ?", id: int = 0, **columns: Any) -> Sample:
    return Sample(id, prompt, completion, Row({"prompt": prompt, **columns}), completion_ids=(4, 2), num_tokens=2)


def wrap(function: Any, *, batch: bool = False) -> RewardFunction:
    return RewardFunction("score", 1.0, 5.0, "skip", batch, False, function)


def value_of(returned: Any) -> Outcome:
    """What becomes of a value, the same in both shapes."""
    alone = wrap(lambda s: returned)([sample()])
    together = wrap(lambda completions: [returned] * len(completions), batch=True)([sample(), sample()])
    assert repr(together) == repr(alone * 2)
    return alone[0]


class TestRow:
    def test_columns_are_attributes_items_and_gettable(self) -> None:
        row = Row({"answer": 42, "level": None})
        assert (row.answer, row["answer"], row.get("answer"), row.get("absent", 7)) == (42, 42, 42, 7)
        assert list(row) == ["answer", "level"]
        assert "level" in row
        assert "absent" not in row
        assert len(row) == 2

    def test_an_unknown_column_is_an_error_that_suggests_the_right_one(self) -> None:
        row = Row({"answer": 42, "level": 1})
        with pytest.raises(
            AttributeError, match=r"no column 'anwser'; did you mean 'answer'\? its columns: answer, level"
        ):
            _ = row.anwser
        with pytest.raises(KeyError, match="did you mean 'answer'"):
            _ = row["anwser"]

    def test_columns_named_like_methods_of_dict_stay_columns(self) -> None:
        row = Row({"values": [1], "items": 2, "keys": 3})
        assert (row.values, row.items, row.keys) == ([1], 2, 3)

    def test_a_sample_pickles_and_copies(self) -> None:
        original = sample(answer=42)
        for again in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            assert again == original
            assert again.row.answer == 42


class TestValues:
    @pytest.mark.parametrize(
        "returned",
        [
            0.5,
            np.float32(0.5),
            np.float64(0.5),
            np.array(0.5),
            torch.tensor(0.5),
            fractions.Fraction(1, 2),
            torch.tensor(0.5, dtype=torch.bfloat16),
            torch.tensor(0.5, requires_grad=True),
        ],
    )
    def test_any_number_is_a_reward(self, returned: Any) -> None:
        assert value_of(returned) == {"score": 0.5}

    @pytest.mark.parametrize("returned", [1, True, np.int64(1), np.bool_(True), torch.tensor(True)])
    def test_whole_numbers_and_truth_values_are_rewards(self, returned: Any) -> None:
        assert value_of(returned) == {"score": 1.0}

    @pytest.mark.parametrize("returned", [None, {}, [], {"a": None}])
    def test_no_opinion_is_nan_and_never_zero(self, returned: Any) -> None:
        outcome = value_of(returned)
        assert isinstance(outcome, dict)
        assert math.isnan(outcome["score"])

    def test_parts_are_named_and_summed(self) -> None:
        assert value_of({"format": 0.25, "answer": np.float32(1)}) == {
            "score": 1.25,
            "score/format": 0.25,
            "score/answer": 1.0,
        }

    def test_a_part_without_opinion_is_left_out_of_the_sum(self) -> None:
        outcome = value_of({"format": 0.25, "answer": None})
        assert isinstance(outcome, dict)
        assert outcome["score"] == 0.25
        assert math.isnan(outcome["score/answer"])

    @pytest.mark.parametrize(
        "returned",
        [
            [0.5, 0.25, -1],
            (0.5, 0.25, -1),
            np.array([0.5, 0.25, -1]),
            torch.tensor([0.5, 0.25, -1]),
            [torch.tensor(0.5), 0.25, np.int8(-1)],
        ],
    )
    def test_steps_are_kept_one_by_one(self, returned: Any) -> None:
        assert value_of(returned) == {"score": (0.5, 0.25, -1.0)}

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (math.nan, "returned nan; a reward must be finite"),
            (np.float32("inf"), "returned inf; a reward must be finite"),
            (torch.tensor(math.nan), "returned nan"),
            (10**400, "returned inf"),
            (1e39, "too large for a 32-bit float"),
            ("1.0", "returned '1.0' (str); a reward is a number, None for no opinion"),
            (1j, "returned 1j (complex)"),
            (object, "(type)"),
            ([1.0, None], "returned None (NoneType) at [1]"),
            ([1.0, math.nan], "returned nan at [1]"),
            ([[1.0]], "returned [1.0] (list) at [0]"),
            (np.zeros((2, 2)), "(ndarray)"),
            ({"a": math.nan}, "returned nan at ['a']"),
            ({"a": "x"}, "returned 'x' (str) at ['a']"),
            ({"a": [1.0, "x"]}, "returned 'x' (str) at ['a'][1]"),
            ({1: 1.0}, "whose keys are not all names"),
            ({"a": 3e38, "b": 3e38}, "too large for a 32-bit float"),
        ],
    )
    def test_anything_else_is_an_error_that_shows_it(self, returned: Any, message: str) -> None:
        outcome = value_of(returned)
        assert isinstance(outcome, Failure)
        assert message in outcome.message


class TestBatchShape:
    def test_only_what_the_signature_accepts_is_passed(self) -> None:
        def score(completions: list[str], answer: list[str], missing: int = 9) -> list[float]:
            assert missing == 9
            return [float(c == a) for c, a in zip(completions, answer, strict=True)]

        samples = [sample("42", answer="42", level=1), sample("41", answer="42", level=2)]
        assert wrap(score, batch=True)(samples) == [{"score": 1.0}, {"score": 0.0}]

    def test_everything_is_passed_to_keyword_arguments(self) -> None:
        seen: dict[str, Any] = {}

        def score(**columns: Any) -> list[float]:
            seen.update(columns)
            return [0.0, 0.0]

        wrap(score, batch=True)([sample("a", answer=1), sample("b", level=2)])
        assert seen == {
            "prompts": ["6 * 7 = ?", "6 * 7 = ?"],
            "completions": ["a", "b"],
            "completion_ids": [[4, 2], [4, 2]],
            "answer": [1, None],
            "level": [None, 2],
        }

    def test_a_conversation_gets_conversational_completions(self) -> None:
        chat = [{"role": "user", "content": "6 * 7 = ?"}]

        def score(prompts: list[Any], completions: list[Any]) -> list[float]:
            assert prompts == [chat]
            assert completions == [[{"role": "assistant", "content": "42"}]]
            return [1.0]

        assert wrap(score, batch=True)([sample("42", chat)]) == [{"score": 1.0}]

    @pytest.mark.parametrize("returned", [np.array([0.5, 1]), torch.tensor([0.5, 1]), (0.5, 1)])
    def test_arrays_and_tuples_are_lists(self, returned: Any) -> None:
        function = wrap(lambda completions: returned, batch=True)
        assert function([sample(), sample()]) == [{"score": 0.5}, {"score": 1.0}]

    def test_a_wrong_length_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="returned 3 rewards for 2 samples"):
            wrap(lambda completions: [0.0] * 3, batch=True)([sample(), sample()])

    @pytest.mark.parametrize("returned", [None, 1.0, "ab", {"a": 1}, np.float64(1)])
    def test_no_list_is_an_error(self, returned: Any) -> None:
        with pytest.raises(TypeError, match="a batch function returns a list with one reward per sample"):
            wrap(lambda completions: returned, batch=True)([sample(), sample()])

    def test_one_bad_reward_leaves_the_others_alone(self) -> None:
        outcomes = wrap(lambda completions: [1.0, math.nan, None], batch=True)([sample()] * 3)
        assert outcomes[0] == {"score": 1.0}
        assert isinstance(outcomes[1], Failure)
        assert "returned nan" in outcomes[1].message
        assert math.isnan(outcomes[2]["score"])  # type: ignore[index]

    def test_a_column_that_the_rows_lack_is_named(self) -> None:
        with pytest.raises(UserError, match="score requires 'solution'; the rows give answer, prompts, completions"):
            wrap(lambda completions, solution: [0.0], batch=True)([sample(answer=1)])


def test_async_functions_of_both_shapes_are_awaited() -> None:
    async def one(s: Sample) -> float:
        return float(s.row.answer)

    async def many(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(c)) for c in completions]

    assert wrap(one)([sample(answer=3)]) == [{"score": 3.0}]
    assert wrap(many, batch=True)([sample("abc")]) == [{"score": 3.0}]


def test_exceptions_of_the_users_code_pass_through() -> None:
    with pytest.raises(AttributeError, match="did you mean 'answer'"):
        wrap(lambda s: s.row.anser)([sample(answer=1)])


USER_FILE = """
from engine.rewards.contract import reward

def plain(sample): return 1.0

@reward
def bare(sample): return 1.0

@reward(weight=0.5, timeout=3, name="nice", on_error="fail")
def full(sample): return 1.0

@reward(gate=True)
def gate(sample): return 1.0

def trl(completions, **kwargs): return [1.0] * len(completions)
def only_keywords(**kwargs): return []
def by_prompts(prompts, **kwargs): return []
def with_default(sample, strict=True): return 1.0
def any_number(*samples): return 1.0
def none(): return 1.0
def two(sample, other): return 1.0
def keyword(sample, *, other): return 1.0

class Model:
    def __call__(self, sample): return 1.0

model = Model()
"""


class TestResolve:
    @pytest.fixture(autouse=True)
    def user_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "rewards.py").write_text(USER_FILE)
        monkeypatch.chdir(tmp_path)

    def resolve(self, function: str, **entry: Any) -> RewardFunction:
        config = RewardConfig(function=f"rewards.py:{function}", **entry)
        return resolve(config, RewardsConfig(functions=[config], timeout=11.0))

    def test_without_settings_the_defaults_hold(self) -> None:
        for name in ("plain", "bare"):
            f = self.resolve(name)
            assert (f.name, f.weight, f.timeout, f.on_error, f.batch) == (name, 1.0, 11.0, "skip", False)

    def test_the_decorator_overrides_the_defaults(self) -> None:
        f = self.resolve("full")
        assert (f.name, f.weight, f.timeout, f.on_error) == ("nice", 0.5, 3, "fail")

    def test_the_entry_overrides_the_decorator_even_with_zero(self) -> None:
        f = self.resolve("full", name="own", weight=0.0, timeout=4.0, on_error="skip")
        assert (f.name, f.weight, f.timeout, f.on_error) == ("own", 0.0, 4.0, "skip")

    @pytest.mark.parametrize(
        ("name", "batch"),
        [
            ("plain", False),
            ("with_default", False),
            ("any_number", False),
            ("model", False),
            ("trl", True),
            ("only_keywords", True),
            ("by_prompts", True),
        ],
    )
    def test_the_shape_follows_from_the_parameters(self, name: str, batch: bool) -> None:
        assert self.resolve(name).batch is batch

    def test_an_object_that_can_be_called_is_named_after_its_spec(self) -> None:
        assert self.resolve("model").name == "model"

    @pytest.mark.parametrize("name", ["none", "two", "keyword"])
    def test_other_parameters_are_refused(self, name: str) -> None:
        with pytest.raises(UserError, match=r"must take one sample, f\(sample\), or lists, .*; it takes \("):
            self.resolve(name)

    def test_a_gate_is_one_by_its_mark_or_by_the_yaml(self) -> None:
        assert (self.resolve("gate").gate, self.resolve("full").gate) == (True, False)
        assert (self.resolve("gate", gate=False).gate, self.resolve("full", gate=True).gate) == (False, True)

    def test_a_name_with_a_slash_is_refused(self) -> None:
        with pytest.raises(UserError, match="must not contain '/'"):
            self.resolve("plain", name="a/b")

    def test_two_components_of_one_name_are_refused(self) -> None:
        twice = [RewardConfig(function="rewards.py:full"), RewardConfig(function="rewards.py:plain", name="nice")]
        with pytest.raises(UserError, match="two components are named 'nice'"):
            resolve_all(RewardsConfig(functions=twice))


def test_a_reward_that_trl_ships_runs_unchanged() -> None:
    from trl.rewards import think_format_reward

    config = RewardConfig(function="trl.rewards:think_format_reward")
    found = resolve(config, RewardsConfig(functions=[config]))
    prompt = [{"role": "user", "content": "why?"}]
    texts = ["<think>\nbecause\n</think>\nso", "so"]
    outcomes = found([Sample(i, prompt, text, Row({})) for i, text in enumerate(texts)])
    expected = think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert [list(outcome.values()) for outcome in outcomes] == [[value] for value in expected] == [[1.0], [0.0]]


def test_the_decorator_leaves_the_function_itself_unchanged() -> None:
    def score(sample: Sample) -> float:
        return 2.0

    assert reward(score) is score
    assert reward(weight=2)(score) is score
    assert score(sample()) == 2.0


@pytest.mark.parametrize(
    "settings", [{"weight": math.nan}, {"weight": math.inf}, {"timeout": 0}, {"timeout": -1}, {"on_error": "stop"}]
)
def test_settings_without_a_sensible_value_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"@reward\\({next(iter(settings))}="):
        reward(**settings)


class TestScoresOfSeveralSources:
    def test_nobody_has_an_opinion_at_first(self) -> None:
        scores = Scores.without_opinion(2)
        assert np.isnan(scores.totals).all()
        assert (scores.size, scores.components, scores.dropped, scores.incidents) == (2, {}, {}, [])

    def test_a_model_adds_a_component_and_leaves_the_others_as_they_are(self) -> None:
        functions = Scores({"f": np.array([1, 2], np.float32)}, np.full(2, np.nan, np.float32))
        both = functions.plus("rm", np.array([3, -1], np.float64), [None, np.array([1.0, -2.0])], [7, 8])
        assert {name: values.tolist() for name, values in both.components.items()} == {"f": [1, 2], "rm": [3, -1]}
        assert both.components["rm"].dtype == np.float32
        assert both.steps["rm"][0] is None
        assert both.steps["rm"][1].tolist() == [1, -2]
        assert (both.dropped, both.incidents) == ({}, [])
        assert set(functions.components) == {"f"}, "it is not changed"

    def test_what_a_function_dropped_stays_dropped_for_its_reason(self) -> None:
        failed = Scores(
            {"f": np.array([1, np.nan, np.nan], np.float32)},
            np.full(3, np.nan, np.float32),
            {1: "reward_timeout", 2: "reward_error"},
            [{"kind": "timeout"}],
        )
        both = failed.plus("rm", np.array([np.inf, 2, np.nan], np.float32), [None] * 3, [7, 8, 9])
        assert both.dropped == {0: "reward_not_finite", 1: "reward_timeout", 2: "reward_error"}
        assert [incident["kind"] for incident in both.incidents] == ["timeout"] + ["reward_not_finite"] * 2
        assert [bool(np.isnan(value)) for value in both.components["rm"]] == [True, False, True]

    def test_each_value_that_is_not_finite_is_an_incident(self) -> None:
        broken = np.array([1, np.nan, np.inf, -np.inf], np.float32)
        scores = Scores.without_opinion(4).plus("rm", broken, [None] * 4, [10, 11, 12, 13])
        assert scores.incidents == [
            {"kind": "reward_not_finite", "function": "rm", "sample_id": i, "attempt": 1, "message": message}
            for i, message in enumerate([f"the reward model gave {x}" for x in ("nan", "inf", "-inf")], 11)
        ]
        assert set(scores.dropped) == {1, 2, 3}


class TestBuiltIns:
    ARGUMENTS: ClassVar[dict[str, Any]] = {"regex": {"pattern": "a"}, "length": {"maximum": 3}} | {
        "json_schema": {"schema": {}},
        "language": {"language": "en"},
        "remote": {"url": "http://127.0.0.1:1", "token_env": "PATH"},
        "judge": {"url": "http://127.0.0.1:1/v1", "model": "m"},
        "generative_verifier": {"url": "http://127.0.0.1:1/v1", "model": "m"},
    }

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_each_is_found_by_its_name_and_takes_one_sample(self, name: str) -> None:
        if name == "code" and not all(protections().values()):
            pytest.skip("this machine lacks a layer of the sandbox")
        config = RewardConfig(function=name, arguments=self.ARGUMENTS.get(name, {}))
        found = resolve(config, RewardsConfig(functions=[config]))
        assert (found.name, found.batch) == (name, False)

    def test_it_scores_like_any_other_function(self) -> None:
        config = RewardConfig(function="numeric", name="right", arguments={"column": "gold"})
        [found] = resolve_all(RewardsConfig(functions=[config]))
        right, wrong = (Sample(i, "p", text, Row({"gold": "12"})) for i, text in enumerate(["so 12", "so 13"]))
        assert found([right, wrong]) == [{"right": 1.0}, {"right": 0.0}]

    def test_a_class_or_factory_of_the_users_is_made_with_the_arguments(self, tmp_path: Path) -> None:
        file = tmp_path / "own.py"
        file.write_text("def at_least(limit):\n    return lambda sample: float(len(sample.completion) >= limit)\n")
        config = RewardConfig(function=f"{file}:at_least", name="long", arguments={"limit": 3})
        [found] = resolve_all(RewardsConfig(functions=[config]))
        assert found([Sample(0, "p", "abc", Row({})), Sample(1, "p", "ab", Row({}))]) == [{"long": 1.0}, {"long": 0.0}]
