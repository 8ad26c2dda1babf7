"""The first losses of a training are those of TRL: same model, same rows in the same order, same optimizer.

    rows --> engine.plan.prepare --> stage --> actors (packed rows) -------\
      |                                                                     > ten losses each
      +----> TRL's trainer of the same method (padded batches, no Ray) ----/

Ten updates of AdamW with a constant learning rate that moves the losses. The rows of the last update are those of the
first, so a loss that moved there did so by training. Prompts and answers are plain text without a chat template; an
answer starts with a space, so that TRL, which tokenises prompt and answer together, finds the same border as we do.

Two choices differ and are stepped around here. TRL's ORPO takes its likelihood term over prompt and chosen answer, ours
over the answer alone: the prompts of its rows are single tokens, which nothing predicts, so that both are the same. For
KTO both pair each prompt with the answer of the row before it, within an update's rows; TRL trains rows in the order of
the data for that, as is done here on both sides, while a whole stage of ours shuffles the rows of its updates.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.split import Split
from engine.cluster import started_workers
from engine.config import Config
from engine.data.batch import Batch
from engine.data.examples import Example, TokenSequence
from engine.plan import prepare
from engine.stages.preference import PreferenceStage, mismatched
from engine.stages.reward_model import RewardModelStage
from engine.stages.sft import SFTStage
from engine.tracking.tracker import Tracker

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]

UPDATES = 10
ROWS_PER_UPDATE = 4
MAX_LENGTH = 12
LEARNING_RATE = 3e-3
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "one", "and", "two", "are", "three"]
STAGES = {"sft": SFTStage, "preference": PreferenceStage, "reward_model": RewardModelStage}

Row = dict[str, Any]
Sequences = list[tuple[list[int], list[bool]]]
"""(token ids, whether each is trained or scored) of every sequence, in the order of our batches."""


def text(source: random.Random, fewest: int, most: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(fewest, most)))


def make_rows(answers: tuple[str, ...], *, single_token_prompts: bool = False) -> list[Row]:
    """Rows with a prompt and these columns, every prompt another; the last update's rows are the first's again."""
    source = random.Random(0)
    distinct = ROWS_PER_UPDATE * (UPDATES - 1)
    letters = string.ascii_letters[:distinct]
    prompts = list(letters) if single_token_prompts else [f"{letter} {text(source, 1, 2)}" for letter in letters]
    rows = [{"prompt": prompt} | {name: f" {text(source, 4, 7)}" for name in answers} for prompt in prompts]
    return rows + rows[:ROWS_PER_UPDATE]


def labelled_rows() -> list[Row]:
    """Of each update's rows, all but one are desirable."""
    return [row | {"label": i % ROWS_PER_UPDATE != 2} for i, row in enumerate(make_rows(("completion",)))]


def rows_with_margins() -> list[Row]:
    return [row | {"margin": 0.25 * (i % ROWS_PER_UPDATE)} for i, row in enumerate(make_rows(("chosen", "rejected")))]


def pairs() -> list[Row]:
    return make_rows(("chosen", "rejected"))


@dataclass(frozen=True)
class Case:
    """One method, as ours is configured and as TRL's is."""

    section: dict[str, Any]
    """Stage and settings of our configuration."""
    trainer: str
    """Module and prefix of TRL's trainer and its configuration."""
    settings: dict[str, Any]
    """Of that configuration."""
    rows: Callable[[], list[Row]] = pairs


def dpo(kind: str, beta: float = 0.1, **label_smoothing: float) -> Case:
    section = {"loss": kind, "beta": beta} | label_smoothing
    settings = {"loss_type": kind, "beta": beta} | label_smoothing
    return Case({"stage": "preference", "preference": section}, "trl.DPO", settings)


CASES = {
    "SFT": Case({"stage": "sft"}, "trl.SFT", {}, lambda: make_rows(("completion",))),
    "DPO": dpo("sigmoid"),
    "hinge": dpo("hinge"),
    "robust": dpo("robust", label_smoothing=0.2),
    "IPO": dpo("ipo"),
    "KTO": Case(
        {
            "stage": "preference",
            "preference": {"loss": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.5},
        },
        "trl.KTO",
        {"desirable_weight": 1.0, "undesirable_weight": 1.5},
        labelled_rows,
    ),
    "ORPO": Case(
        {"stage": "preference", "preference": {"loss": "orpo", "beta": 0.2}},
        "trl.experimental.orpo.ORPO",
        {"beta": 0.2},
        lambda: make_rows(("chosen", "rejected"), single_token_prompts=True),
    ),
    "SimPO": Case(
        {"stage": "preference", "preference": {"loss": "simpo", "beta": 2.0, "simpo_gamma": 0.5}},
        "trl.experimental.cpo.CPO",
        {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    ),
    "reward model": Case({"stage": "reward_model"}, "trl.Reward", {}),
    "reward model, margins, centered": Case(
        {"stage": "reward_model", "reward_model": {"center_coef": 0.01}},
        "trl.Reward",
        {"center_rewards_coefficient": 0.01},
        rows_with_margins,
    ),
}


@dataclass(frozen=True)
class Training:
    """What one side trained on, and its losses."""

    losses: list[float]
    sequences: Sequences
    mismatched: Sequences = field(default_factory=list)
    """KTO's answers to other prompts."""
    baselines: list[float] = field(default_factory=list)
    """KTO's, of each update."""
    microbatches: list[int] = field(default_factory=list)
    """Forward passes of each update."""


@pytest.fixture(scope="module")
def start_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that both sides start from in a stage; a reward model's head is saved with it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scored = tmp_path_factory.mktemp("models") / "scored"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1).save_pretrained(scored)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(scored)
    return lambda stage: scored if stage == "reward_model" else tiny_model


@pytest.fixture(scope="module")
def ours(
    start_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Training]:
    """Trains a case with a token budget per micro-batch, once for all tests."""

    @cache
    def train(name: str, tokens_per_microbatch: int) -> Training:
        case, folder = CASES[name], tmp_path_factory.mktemp("ours")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows()))
        config = Config.model_validate(
            {
                "name": "conformance",
                "output_dir": str(folder),
                "model": {"path": str(start_model(case.section["stage"]))},
                "data": {"train": str(folder / "rows.jsonl"), "chat_template": "never"},
                "training": {"updates": UPDATES, "rows_per_update": ROWS_PER_UPDATE, "max_length": MAX_LENGTH},
                "policy": {"tokens_per_microbatch": tokens_per_microbatch},
                "optimizer": {"learning_rate": LEARNING_RATE, "betas": BETAS, "max_grad_norm": MAX_GRAD_NORM},
                **case.section,
            }
        )
        return train_ours(config)

    return train


def train_ours(config: Config) -> Training:
    plan = prepare(config)
    tracker = Tracker(config)
    with started_workers(config, updates=plan.updates) as workers:
        stage = STAGES[config.stage](config, workers, tracker, plan)
        stage.begin(0)
        losses, baselines, microbatches = [], [], []
        for update in range(UPDATES):
            batch = stage.batch(range(update * ROWS_PER_UPDATE, (update + 1) * ROWS_PER_UPDATE), update + 1)
            losses.append(stage.trained.update([batch])["train/loss"])
            baselines += batch.labels.get("kl_baseline", np.zeros(0))[:1].tolist()
            microbatches.append(forward_passes(config, stage.trained.hidden_size, batch))
    tracker.close("succeeded")
    foreign = stage.mismatched if isinstance(stage, PreferenceStage) else []
    return Training(losses, sequences_of(plan.train), sequences_of(foreign), baselines, microbatches)


def forward_passes(config: Config, hidden_size: int, batch: Batch) -> int:
    budget, whole_groups = config.policy.tokens_per_microbatch, config.stage != "sft"
    split = Split.of(batch, ranks=1, token_budget=budget, hidden_size=hidden_size, whole_groups=whole_groups)
    return len(split.plan[0])


def sequences_of(examples: Sequence[Example]) -> Sequences:
    return [(s.tokens.tolist(), s.mask.tolist()) for example in examples for s in example.sequences]


def train_theirs(case: Case, model: Path, folder: Path) -> Training:
    """TRL's trainer on the same rows, sequentially."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    module, _, prefix = case.trainer.rpartition(".")
    trainer_class = getattr(import_module(module), f"{prefix}Trainer")
    config_class = getattr(import_module(module), f"{prefix}Config")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    settings = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS_PER_UPDATE,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=MAX_GRAD_NORM,
        weight_decay=0.0,
        max_length=MAX_LENGTH,
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **case.settings,
    )
    dataset = Dataset.from_list(case.rows())
    trainer = trainer_class(model=str(model), args=settings, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    columns = trainer.train_dataset.to_list()
    sequences = [sequence for row in columns for sequence in trl_sequences(row)]
    if "KL_completion_ids" not in columns[0]:
        return Training(losses, sequences)
    foreign = [answered(row["prompt_ids"], row["KL_completion_ids"]) for row in columns]
    baselines = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    return Training(losses, sequences, foreign, baselines)


def trl_sequences(row: Row) -> Sequences:
    """A row of TRL's prepared data, whose columns each trainer names its own way."""
    if "labels" in row:  # SFT
        return [masked_by(row["input_ids"], row["labels"])]
    if "chosen_labels" in row:  # ORPO, CPO
        return [masked_by(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected")]
    if "completion_ids" in row:  # KTO
        return [answered(row["prompt_ids"], row["completion_ids"])]
    if "prompt_ids" in row:  # DPO
        return [answered(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")]
    # A reward model scores the last token.
    return [answered(row[f"{side}_ids"][:-1], row[f"{side}_ids"][-1:]) for side in ("chosen", "rejected")]


def masked_by(ids: list[int], labels: list[int]) -> tuple[list[int], list[bool]]:
    return ids, [label != -100 for label in labels]


def answered(prompt: list[int], answer: list[int]) -> tuple[list[int], list[bool]]:
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


PACKED = ROWS_PER_UPDATE * 2 * MAX_LENGTH


@pytest.mark.parametrize("name", CASES)
def test_the_first_losses_are_those_of_trl(name, ours, start_model, tmp_path):
    mine = ours(name, PACKED)
    theirs = train_theirs(CASES[name], start_model(CASES[name].section["stage"]), tmp_path)
    assert mine.sequences == theirs.sequences, "both are trained on the same tokens, the last one of each ends it"
    assert mine.mismatched == theirs.mismatched
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert abs(mine.losses[-1] / mine.losses[0] - 1) > 0.01, "training has moved the loss"
    if name == "KTO":
        assert mine.baselines == pytest.approx(theirs.baselines, rel=1e-3, abs=1e-5)
        assert sum(baseline > 0.01 for baseline in mine.baselines) >= UPDATES // 2, "the baseline takes part"


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_packed_rows_give_the_losses_of_rows_alone(name, ours):
    packed, alone = ours(name, PACKED), ours(name, MAX_LENGTH)
    assert set(packed.microbatches) == {1}
    assert set(alone.microbatches) == {ROWS_PER_UPDATE}
    assert packed.losses == pytest.approx(alone.losses, rel=1e-5)


def test_the_kl_baseline_takes_answers_to_other_prompts_wherever_there_are_any():
    """KTO's mismatched answers are unrelated to the prompt (arXiv:2402.01306); those of a pair would not be."""
    pairs = [
        Example((TokenSequence(np.array([prompt, answer], np.int32), np.array([False, True])),), {}, {})
        for prompt, answer in [(1, 11), (1, 12), (2, 21), (2, 22), (3, 31), (3, 32), (4, 41), (4, 42)]
    ]
    foreign = [tokens for tokens, _ in sequences_of(mismatched(pairs, 6, 99))]
    assert foreign == [[1, 31], [1, 32], [2, 11], [2, 12], [3, 21], [3, 22], [4, 42], [4, 41]]
