"""Shared by all tests: a tiny model with a real tokenizer, and one Ray cluster per session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from engine.ray_token import use_private_token

use_private_token()  # before anything imports Ray


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--thorough` trains with more seeds, and runs the tests marked so: what others cover in other words."""
    parser.addoption(
        "--thorough", action="store_true", help="three seeds for each preset, and the tests marked thorough"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark."""
    config.addinivalue_line("markers", "thorough: run with --thorough only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is for `--thorough` only."""
    left_out = [] if config.getoption("--thorough") else [i for i in items if i.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def thorough(*values: Any) -> list[Any]:
    """Parameters of a test (tuples of several) that are tried with `--thorough` only."""
    each = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*parts, marks=pytest.mark.thorough) for parts in each]


@pytest.fixture(scope="session")
def seeds(request: pytest.FixtureRequest) -> range:
    """What to train with."""
    return range(3 if request.config.getoption("--thorough") else 1)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_model(folder: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A two-layer Llama with random weights and a byte-level BPE tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4, "one and two are three " * 4], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny model whose input and output embeddings are tied."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output embedding of its own."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray cluster that all tests of the session share."""
    import ray

    ray.init(
        address="local",
        num_cpus=16,
        resources={"accel": 4},  # stand-ins for devices
        include_dashboard=False,
        object_store_memory=2**30,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture
def raw_config(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A small valid run, to be written as YAML or changed first."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "number {i}", "answer": "{i}"}}\n' for i in range(8)))
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(
        "from engine import Sample, reward\n\n\n@reward(timeout=10)\ndef share_of_e(sample: Sample) -> float:\n"
        "    return sample.completion.count('e') / max(1, sample.num_tokens)\n"
    )
    return {
        "name": "test",
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model)},
        "data": {"train": str(rows), "evaluation": str(rows)},
        "rewards": {"functions": [f"{rewards}:share_of_e"]},
        "rl": {"steps": 2, "prompts_per_step": 4, "samples_per_prompt": 4},
        "policy": {"tokens_per_microbatch": 256},
        "rollout": {"max_new_tokens": 8, "max_model_len": 64, "kv_cache_gib": 0.03},
        "evaluation": {"prompts": 4},
    }
