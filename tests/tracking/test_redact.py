"""Secrets are masked, and what only sounds like one is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from engine.config import Config
from engine.tracking.redact import MASK, is_secret_name, redact

HEX40 = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "APIKEY",
        "WANDB_API_KEY",
        "hf_token",
        "HFToken",
        "db.password",
        "client-secret",
        "credentials",
    ],
)
def test_a_key_with_a_secret_word_hides_its_value(name: str) -> None:
    assert redact({name: "plain-looking"}) == {name: MASK}
    assert redact({name: 12345}) == {name: MASK}
    assert redact({name: {"a": ["x", None]}}) == {name: {"a": [MASK, None]}}


@pytest.mark.parametrize(
    "name",
    [
        "max_new_tokens",
        "tokens_per_microbatch",
        "max_prompt_tokens",
        "tokenizer",
        "time/tokens_per_second",
        "monkey",
        "keyboard",
    ],
)
def test_a_key_that_only_contains_the_letters_is_left_alone(name: str) -> None:
    assert redact({name: 17, "nested": [{name: "words"}]}) == {name: 17, "nested": [{name: "words"}]}


def test_no_field_of_our_own_configuration_is_taken_for_a_secret() -> None:
    def names(section: type[BaseModel]) -> list[str]:
        inner = [f.annotation for f in section.model_fields.values()]
        deeper = [n for a in inner if isinstance(a, type) and issubclass(a, BaseModel) for n in names(a)]
        return [*section.model_fields, *deeper]

    found = names(Config)
    assert "tokens_per_microbatch" in found
    assert not [name for name in found if is_secret_name(name)]


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3dE5gH7" * 3,
        "sk-proj-" + "a1B2c3D4" * 4,
        "AKIA" + "ABCDEFGH23456789",
        "ghp_" + "a1B2c3D4e5" * 3,
        HEX40,
        "wandb_v1_" + "a1B2c3D4e5" * 4,
    ],
)
def test_a_value_that_looks_like_a_secret_is_masked_wherever_it_stands(secret: str) -> None:
    for text in (secret, f"login failed for {secret}!", f"'{secret}',"):
        assert secret not in redact({"note": [text]})["note"][0]
        assert MASK in redact(text)
    assert secret not in str(redact(Path("models") / secret))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host.example/x?a=1", f"https://{MASK}@host.example/x?a=1"),
        ("https://me:p@ss@host.example/x", f"https://{MASK}@host.example/x"),
        ("https://host.example/x?api_key=abc&a=1", f"https://host.example/x?api_key={MASK}&a=1"),
        ("https://host.example/x?a=1&X-Token=abc#top", f"https://host.example/x?a=1&X-Token={MASK}#top"),
        ("run --api-key abc --seed 3", f"run --api-key {MASK} --seed 3"),
        ("judge.api_key=abc rl.steps=3", f"judge.api_key={MASK} rl.steps=3"),
        ("{'password': 'a b', 'x': 1}", f"{{'password': {MASK}, 'x': 1}}"),
        ("Authorization: Bearer abcdefgh1234", f"Authorization: Bearer {MASK}"),
    ],
)
def test_urls_and_command_lines_lose_their_secrets_and_nothing_else(text: str, masked: str) -> None:
    assert redact(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'prompt' in rewards.py:12",
        "https://host.example:8265/jobs?max_new_tokens=5",
        "models/SmolLM2-135M-Instruct",
        "sk-learn and hf_hub",
        "mail me@host.example",
    ],
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert redact(text) == text


def test_the_value_of_a_secret_environment_variable_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    monkeypatch.setenv("MY_SERVICE_MODE", "ordinary-setting")
    assert redact("sent correct-horse-battery as ordinary-setting") == f"sent {MASK} as ordinary-setting"


def test_the_input_is_not_changed_and_types_are_kept() -> None:
    value: dict[str, Any] = {"api_key": "x", "list": ["a"], "pair": (1, 2.5), "none": None, "flag": True}
    before = {**value, "list": list(value["list"])}
    masked = redact(value)
    assert value == before
    assert masked == {"api_key": MASK, "list": ["a"], "pair": (1, 2.5), "none": None, "flag": True}
