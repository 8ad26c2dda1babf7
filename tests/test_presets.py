"""Presets under the keys of a configuration, and every rule about algorithms and placement that spans several keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import AlgorithmConfig, Config
from engine.presets import PRESETS

CRITIC = {"advantage": "gae"}
PAIRS = {"name": "online_dpo"}


def configure(**sections: Any) -> Config:
    raw: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "t"}, "rewards": {"functions": ["a.py:f"]}}
    return Config.model_validate(raw | sections)


def problems(**sections: Any) -> list[str]:
    """One line per broken rule."""
    with pytest.raises(ValidationError) as caught:
        configure(**sections)
    [error] = caught.value.errors()
    return str(error["ctx"]["error"]).splitlines()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_its_values_are_taken(name):
    algorithm = configure(algorithm=name).algorithm
    assert algorithm.name == name
    assert algorithm == configure(algorithm={"name": name}).algorithm
    for key, value in PRESETS[name].items():
        got = getattr(algorithm, key)
        if isinstance(value, dict):
            assert {k: getattr(got, k) for k in value} == value
        else:
            assert got == value
    untouched = AlgorithmConfig.model_fields.keys() - PRESETS[name].keys() - {"name"}
    assert {key: getattr(algorithm, key) for key in untouched} == {
        key: getattr(AlgorithmConfig(), key) for key in untouched
    }


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_only_repeats_what_another_says(name):
    assert [other for other in PRESETS if PRESETS[other] == PRESETS[name]] == [name]


def test_what_the_yaml_gives_wins_over_the_preset_also_where_it_is_the_default():
    given = {"name": "gspo", "clip_low": 0.2, "gamma": 0.5}
    algorithm = configure(algorithm=given).algorithm
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.gamma) == (0.2, 4e-4, 0.5)
    assert algorithm.loss == "gspo"
    assert given == {"name": "gspo", "clip_low": 0.2, "gamma": 0.5}, "what was given is not changed"
    assert PRESETS["gspo"]["clip_low"] == 3e-4


def test_without_a_name_the_algorithm_is_grpo():
    for sections in ({}, {"algorithm": {}}, {"algorithm": {"name": "grpo"}}, {"algorithm": "grpo"}):
        assert configure(**sections).algorithm == AlgorithmConfig(name="grpo")
    assert configure(algorithm={"kl_coef": 0.25}).algorithm == AlgorithmConfig(kl_coef=0.25)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("gppo", "no algorithm is called 'gppo'; did you mean 'ppo'?"),
        ({"name": "dr-grpo"}, "no algorithm is called 'dr-grpo'; did you mean 'dr_grpo'?"),
        ({"name": "zzz"}, f"no algorithm is called 'zzz'; known: {', '.join(PRESETS)}"),
        ({"name": 3}, f"no algorithm is called 3; known: {', '.join(PRESETS)}"),
    ],
)
def test_a_name_that_is_no_preset_is_told(given, says):
    with pytest.raises(ValidationError) as caught:
        configure(algorithm=given)
    [error] = caught.value.errors()
    assert (error["loc"][0], str(error["ctx"]["error"])) == ("algorithm", says)


@pytest.mark.parametrize("given", [["ppo"], 3, None])
def test_what_is_neither_a_name_nor_a_section_is_refused(given):
    with pytest.raises(ValidationError) as caught:
        configure(algorithm=given)
    [error] = caught.value.errors()
    assert error["loc"][0] == "algorithm"


STEERED = {"name": "ppo", "kl_target": 1.0}
STEP = {"reference": "step", "kl_coef": 0.1}
TWICE = {"rl": {"minibatches_per_step": 2}}
GROUPS = [["policy", "rollout"]]

RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # (start of the message, sections that break the rule, the nearest sections that keep it)
    (
        "algorithm.advantage: 'gea' is none of gae, returns,",
        {"algorithm": {"advantage": "gea"}},
        {"algorithm": {"advantage": "gea.py:gae"}},
    ),
    (
        "algorithm.loss: 'ppo' is none of ppo_clip, gspo,",
        {"algorithm": {"loss": "ppo"}},
        {"algorithm": {"loss": "mine:ppo"}},
    ),
    (
        "algorithm.loss: preference and algorithm.advantage: best_vs_worst go together",
        {"algorithm": {"loss": "preference"}},
        {"algorithm": PAIRS},
    ),
    (
        "algorithm.loss: preference and algorithm.advantage: best_vs_worst go together",
        {"algorithm": {"advantage": "best_vs_worst"}},
        {"algorithm": {"advantage": "best_of_n"}},
    ),
    (
        "preference.loss: pairs of rollouts are not trained with kto",
        {"algorithm": PAIRS, "preference": {"loss": "kto"}},
        {"algorithm": PAIRS, "preference": {"loss": "ipo"}},
    ),
    (
        "algorithm.kl_coef, algorithm.entropy_coef: a preference loss has no such term",
        {"algorithm": PAIRS | {"kl_coef": 0.1}},
        {"algorithm": PAIRS | {"kl_coef": 0.0}},
    ),
    (
        "algorithm.kl_coef, algorithm.entropy_coef: a preference loss has no such term",
        {"algorithm": PAIRS | {"entropy_coef": 0.1}},
        {"algorithm": {"entropy_coef": 0.1}},
    ),
    (
        "algorithm.kl_estimator: k1 in the loss has no gradient in expectation",
        {"algorithm": {"kl_coef": 0.1, "kl_estimator": "k1"}},
        {"algorithm": {"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "reward"}},
    ),
    (
        "algorithm.kl_target: there is no KL term to steer",
        {"algorithm": {"kl_target": 1.0}},
        {"algorithm": {"kl_target": 1.0, "kl_coef": 0.1}},
    ),
    (
        "algorithm.kl_horizon: must be over a fifth of the 128 samples of a step",
        {"algorithm": STEERED | {"kl_horizon": 25.6}},
        {"algorithm": STEERED | {"kl_horizon": 25.7}},
    ),
    (
        "algorithm.target_kl: a preference loss has no ratio",
        {"algorithm": PAIRS | {"target_kl": 0.1}},
        {"algorithm": {"target_kl": 0.1}},
    ),
    (
        "algorithm.reference: the KL to the policy that sampled is 0 until a step's second update",
        {"algorithm": STEP},
        {"algorithm": STEP} | TWICE,
    ),
    (
        "algorithm.reference: the KL to the policy that sampled is 0 until a step's second update",
        {"algorithm": STEP | {"kl_in": "reward"}} | TWICE,
        {"algorithm": STEP | {"kl_in": "reward", "reference": "start"}} | TWICE,
    ),
    (
        "algorithm.reference: the KL to the policy that sampled is 0 until a step's second update",
        {"algorithm": STEP | {"kl_target": 1.0}} | TWICE,
        {"algorithm": STEP | {"kl_coef": 0.0}},
    ),
    (
        "critic.warmup_steps: this algorithm has no critic",
        {"critic": {"warmup_steps": 1}},
        {"critic": {"warmup_steps": 1}, "algorithm": CRITIC},
    ),
    (
        "critic.warmup_steps: leaves no step of rl.steps in which the policy is trained",
        {"critic": {"warmup_steps": 5}, "algorithm": CRITIC, "rl": {"steps": 5}},
        {"critic": {"warmup_steps": 4}, "algorithm": CRITIC, "rl": {"steps": 5}},
    ),
    (
        "rl.samples_per_prompt: rloo compares the samples of one prompt",
        {"algorithm": "rloo", "rl": {"samples_per_prompt": 1}},
        {"algorithm": "reinforce_pp", "rl": {"samples_per_prompt": 1}},
    ),
    (
        "algorithm.correction.floor: must be below algorithm.correction.cap",
        {"algorithm": {"correction": {"floor": 2.0}}},
        {"algorithm": {"correction": {"floor": 1.9}}},
    ),
    (
        "placement.groups: roles share nothing with mode: separate",
        {"placement": {"groups": GROUPS}},
        {"placement": {"groups": GROUPS, "mode": "packed"}},
    ),
    (
        "placement.groups: a role is named twice",
        {"placement": {"groups": [*GROUPS, ["policy"]], "mode": "packed"}},
        {"placement": {"groups": [*GROUPS, ["critic"]], "mode": "packed"}},
    ),
    (
        "placement.mode: turns on a GPU offloads the trained models through DeepSpeed, which needs ZeRO",
        {"placement": {"mode": "turns"}, "device": "cuda"},
        {"placement": {"mode": "turns"}, "device": "cpu"},
    ),
    (
        "placement.mode: turns on a GPU offloads the trained models through DeepSpeed, which needs ZeRO",
        {"placement": {"mode": "turns"}, "device": "cuda", "algorithm": "ppo"},
        {"placement": {"mode": "turns"}, "device": "cuda", "algorithm": "ppo", "policy": {"zero_stage": 1}},
    ),
]


@pytest.mark.parametrize(("says", "broken", "kept"), RULES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_rule_is_told_alone_and_what_is_just_within_it_is_not(says, broken, kept):
    [problem] = problems(**broken)
    assert problem.startswith(says)
    configure(**kept)


def test_each_rule_names_a_key_that_there_is():
    sections: Any = Config.model_fields
    for says, _, _ in RULES:
        for key in says.split(": ")[0].split(", "):
            section, *path = key.split(".")
            fields = sections[section].annotation.model_fields
            for part in path:
                assert part in fields, key
                fields = getattr(fields[part].annotation, "model_fields", {})


def test_rules_about_rl_do_not_concern_other_stages():
    sft = {"stage": "sft", "rewards": {}}
    configure(algorithm={"kl_target": 1.0}, critic={"warmup_steps": 3}, **sft)
    turns = {"placement": {"mode": "turns"}, "device": "cuda", "policy": {"zero_stage": 1}}
    configure(algorithm="ppo", **turns, **sft)
