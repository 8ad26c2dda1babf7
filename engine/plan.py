"""Preflight: all that can be found wrong with a stage before Ray, a model or a GPU starts, and its rows as tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import Config, SourceConfig, UserError
from engine.data.conversations import build_conversations
from engine.data.corpus import Corpus, build_corpus
from engine.data.examples import Example, PreparedExamples
from engine.data.ngrams import unigram_and_bigram_perplexity
from engine.data.pieces import Pieces
from engine.data.preferences import build_pairs, build_unpaired
from engine.data.prompts import Prompt, build_prompts
from engine.data.rankings import build_rankings
from engine.data.sources import Rows, load_rows
from engine.data.steps import StepCutter, build_steps
from engine.data.turns import TurnTokens
from engine.environments.contract import load_environment
from engine.model_folder import check_model, load_tokenizer, make_start, start_folder
from engine.rewards.composition import Component, components_of
from engine.user_code import load_object


@dataclass(frozen=True)
class Plan:
    """A stage that passed the checks. What it has no use for is empty."""

    train: Sequence[Example] = ()
    """Rows of an offline stage."""
    held_out: Sequence[Example] = ()
    """Rows to be measured on."""
    general_text: Sequence[Example] = ()
    """Pieces of text that show what is forgotten."""
    train_prompts: Sequence[Prompt] = ()
    """Prompts for reinforcement learning."""
    held_out_prompts: Sequence[Prompt] = ()
    """Prompts to be answered and scored."""
    skipped: Sequence[str] = ()
    """Rows left out, each with its reason."""
    rows: int = 0
    """Rows that all updates together take."""
    updates: int = 0
    """Optimizer updates of the whole stage."""
    annotators: tuple[str, ...] = ()
    """Values of the column `annotator`, one reward head each."""
    cutter: StepCutter | None = None
    """Says where the steps of a response end, where `rewards.steps` is set."""
    components: Sequence[Component] = ()
    """Of the reward."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Perplexity of n-gram models of the training text on the held-out text."""


def prepare(config: Config, *, unmade: Collection[str] = ()) -> Plan:
    """Check model folders, tokenizer, reward functions and every data row.

    `unmade` are the keys of `config.model_paths` that stand for models which earlier stages will make: tokenizer and
    configuration are there, weights are not.

    Raises:
        UserError: with what is wrong, where, and how to mend it.
    """
    return _checked(config, unmade=unmade, unread=(), rows=True, attempt=_at_once)


def inspect(
    config: Config, problems: list[str], *, unmade: Collection[str], unread: Collection[str], rows: bool
) -> Plan:
    """The same as far as it goes: what is wrong is added to `problems`, and what hangs on it is left out.

    `unread` are the keys of models without a tokenizer; `rows` is whether data rows are read.
    """

    def attempt(check: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            return check(*args, **named)
        except UserError as error:
            problems.append(str(error))
            return None

    return _checked(config, unmade=unmade, unread=unread, rows=rows, attempt=attempt)


def _at_once(check: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """A check whose error ends the preflight."""
    return check(*args, **named)


def _checked(
    config: Config, *, unmade: Collection[str], unread: Collection[str], rows: bool, attempt: Callable[..., Any]
) -> Plan:
    """Every check by way of `attempt`, which returns None where one failed and the others are to go on."""
    components = attempt(components_of, config) or ()
    if config.stage == "rl":
        for key, place in (("advantage", config.algorithm.advantage), ("loss", config.algorithm.loss)):
            if ":" in place:
                attempt(load_object, place, what=f"algorithm.{key}")
    if config.model.new is None:
        attempt(check_model, config, weights="model.path" not in unmade)
    elif rows:
        attempt(make_start, config)
    unstarted = config.model.new is not None and not start_folder(config).is_dir()  # why has been told
    tokenizer = None if unstarted or "model.path" in unread else attempt(load_tokenizer, config)
    if tokenizer is None:
        return replace(_untokenised(config, attempt) if rows else Plan(), components=components)
    if config.environment is not None:  # raises where answers cannot be followed by replies
        attempt(TurnTokens, tokenizer, config.data)
    for key, path in config.model_paths.items():
        if key not in unread:
            attempt(_check_other_model, config, key, path, tokenizer, made=key not in unmade)
    build = {"rl": _prompts_plan, "pretrain": _text_plan}.get(config.stage, _examples_plan)
    plan = attempt(build, config, tokenizer) if rows else None
    cutter = attempt(StepCutter, tokenizer, config.rewards.steps) if config.rewards.steps else None
    return replace(plan or Plan(), cutter=cutter, components=components)


def _untokenised(config: Config, attempt: Callable[..., Any]) -> Plan:
    """What can be said of rows that cannot be made into tokens: whether they can be read, and how many there are."""
    how = {"columns": config.data.columns, "on_bad_row": config.data.on_bad_row, "required": ()}
    read = [attempt(load_rows, source, **how) for source in (config.data.train, config.data.evaluation) if source]
    if config.stage in ("rl", "pretrain") or read[0] is None:
        return Plan()
    rows, updates = _amount(config, len(read[0].rows))
    return Plan(rows=rows, updates=updates, skipped=read[0].skipped)


def _check_other_model(config: Config, key: str, path: str, tokenizer: Any, *, made: bool) -> None:
    """A model beside the one that is trained can work with it.

    Raises:
        UserError: it cannot.
    """
    if key == "distill.teacher":
        _check_teacher(config, tokenizer)
    if key == "critic.path" or key.startswith("rewards.models"):
        _check_reward_model(config, key, path, tokenizer, made=made)
    if key.startswith("rewards.servers") and not load_tokenizer(config, path=path, key=key).chat_template:
        raise UserError(f"{key}: {path} has no chat template, which a judge is asked with; take a chat model")


def _prompts_plan(config: Config, tokenizer: Any) -> Plan:
    skipped: list[str] = []
    tools = load_environment(config.environment)[1] if config.environment is not None else []

    def prompts(source: SourceConfig) -> list[Prompt]:
        rows = load_rows(source, columns=config.data.columns, on_bad_row=config.data.on_bad_row)
        limit = config.max_prompt_tokens
        prepared = build_prompts(rows, tokenizer, data=config.data, max_prompt_tokens=limit, tools=tools)
        skipped.extend(prepared.skipped)
        return prepared.prompts

    train = prompts(config.data.train)
    held_out = prompts(config.data.evaluation)[: config.evaluation.prompts] if config.data.evaluation else []
    updates = config.rl.steps * config.updates_per_step
    return Plan(train_prompts=train, held_out_prompts=held_out, skipped=skipped, updates=updates)


def _text_plan(config: Config, tokenizer: Any) -> Plan:
    train = _corpus(config, config.data.train, tokenizer, "train")
    held_out = _corpus(config, config.data.evaluation, tokenizer, "held_out") if config.data.evaluation else None
    general = _corpus(config, config.data.general_text, tokenizer, "general") if config.data.general_text else None
    baselines: dict[str, float] = {}
    if held_out is not None:
        unigram, bigram = unigram_and_bigram_perplexity(train, held_out, len(tokenizer))
        baselines = {"eval/unigram_perplexity": unigram, "eval/bigram_perplexity": bigram}
    rows, updates = _amount(config, len(train))
    return Plan(
        train=Pieces(train),
        held_out=Pieces(held_out, config.evaluation.prompts) if held_out is not None else (),
        general_text=Pieces(general) if general is not None else (),
        skipped=train.skipped + (held_out.skipped if held_out else []),
        rows=rows,
        updates=updates,
        baselines=baselines,
    )


def _corpus(config: Config, source: SourceConfig, tokenizer: Any, name: str) -> Corpus:
    folder = config.run_dir / "corpus" / name
    return build_corpus(source, tokenizer, folder, data=config.data, max_length=config.training.max_length)


def _examples_plan(config: Config, tokenizer: Any) -> Plan:
    data = config.data
    train = _build(config, data.train, tokenizer)
    held_out = _build(config, data.evaluation, tokenizer, annotators=train.annotators) if data.evaluation else None
    examples = held_out.examples[: config.evaluation.prompts] if held_out else []
    rows, updates = _amount(config, len(train.examples))
    answers = config.generates and not (config.stage == "distill" and config.distill.mode == "sequence")
    return Plan(
        train=train.examples,
        held_out=examples,
        general_text=Pieces(_corpus(config, data.general_text, tokenizer, "general")) if data.general_text else (),
        held_out_prompts=_held_out_prompts(config, examples) if answers else (),
        skipped=train.skipped + (held_out.skipped if held_out else []),
        rows=rows,
        updates=updates,
        annotators=train.annotators,
    )


def _build(
    config: Config, source: SourceConfig, tokenizer: Any, annotators: tuple[str, ...] | None = None
) -> PreparedExamples:
    """The rows of a source as token sequences, in the way of the stage."""
    data, longest = config.data, config.training.max_length
    prompted = config.stage == "distill" and config.distill.on_policy_fraction == 1
    required = ("prompt",) if prompted else ()
    rows = load_rows(source, columns=data.columns, on_bad_row=data.on_bad_row, required=required)
    common: dict[str, Any] = {"data": data, "max_length": longest}
    match config.stage, config.reward_model.kind:
        case "preference", _:
            build = build_unpaired if config.preference.loss == "kto" else build_pairs
            return build(rows, tokenizer, **common)
        case "reward_model", "process":
            return build_steps(rows, tokenizer, separator=config.reward_model.step_separator, **common)
        case "reward_model", kind:
            build = build_rankings if kind == "ranking" else build_pairs
            prepared = build(rows, tokenizer, score_last=True, **common)
            return _with_annotators(config, prepared, annotators)
        case "distill", _ if prompted:
            return _bare_prompts(config, rows, tokenizer)
        case _:
            return build_conversations(rows, tokenizer, sft=config.sft, **common)


def _amount(config: Config, available: int) -> tuple[int, int]:
    """(rows, updates): `training.updates` full ones, or those of `training.epochs`, where the last may be smaller."""
    training = config.training
    if training.updates is not None:
        return training.updates * training.rows_per_update, training.updates
    rows = max(1, round(training.epochs * available))
    return rows, math.ceil(rows / training.rows_per_update)


def _held_out_prompts(config: Config, examples: Sequence[Example]) -> list[Prompt]:
    """The prompts of held-out rows, to be answered.

    Raises:
        UserError: one leaves no room for an answer.
    """
    prompts = [example.prompt for example in examples if example.prompt is not None]
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if longest > config.max_prompt_tokens:
        raise UserError(
            f"data.evaluation: a prompt has {longest} tokens, the limit is {config.max_prompt_tokens}; raise "
            "rollout.max_model_len or data.max_prompt_tokens, or leave rewards.functions out, which score the answers"
        )
    return prompts


def _bare_prompts(config: Config, rows: Rows, tokenizer: Any) -> PreparedExamples:
    """Prompts that the student will answer."""
    limit = min(config.max_prompt_tokens, config.training.max_length - 1)
    prepared = build_prompts(rows, tokenizer, data=config.data, max_prompt_tokens=limit)
    examples = [Example(sequences=(), labels={}, row=prompt.row, prompt=prompt) for prompt in prepared.prompts]
    return PreparedExamples(examples, prepared.skipped)


def _with_annotators(config: Config, prepared: PreparedExamples, known: tuple[str, ...] | None) -> PreparedExamples:
    """Annotators numbered as in the training rows (`known`), or left out where they have no heads.

    Raises:
        UserError: heads are wanted and rows name no annotator, or one that the training rows do not have.
    """
    if not config.reward_model.annotator_heads:
        return replace(prepared, annotators=())
    if not prepared.annotators:
        raise UserError("reward_model.annotator_heads: the rows have no column 'annotator'; add it or set it to false")
    names = known if known is not None else prepared.annotators
    if new := [name for name in prepared.annotators if name not in names]:
        raise UserError(
            f"data.evaluation: annotator {new[0]!r} is not in the training rows, so there is no head for it"
        )
    number = {float(i): float(names.index(name)) for i, name in enumerate(prepared.annotators)}
    examples = [
        replace(e, labels=e.labels | {"annotator": tuple(number[i] for i in e.labels["annotator"])})
        for e in prepared.examples
    ]
    return replace(prepared, examples=examples, annotators=names)


def _check_reward_model(config: Config, key: str, path: str, tokenizer: Any, *, made: bool) -> None:
    """A folder of the reward-model stage, whose tokens are the policy's.

    Raises:
        UserError: it is not.
    """
    record = Path(path) / "reward_model.json"
    if made and not record.is_file():
        raise UserError(f"{key}: {path} is no reward model of Gnomon's: it has no {record.name}; train one first")
    if made and key == "critic.path" and json.loads(record.read_text())["kind"] == "process":
        raise UserError(f"{key}: {path} scores steps, not responses; use a pairwise or ranking reward model, or none")
    _check_steps(config, key, record, made=made)
    if load_tokenizer(config, path=path, key=key).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{key}: {path} has another vocabulary than {config.model.path}, so it cannot read the policy's tokens; "
            "use a reward model made from the same family"
        )


def _check_steps(config: Config, key: str, record: Path, *, made: bool) -> None:
    """A model that rewards each step sees the same steps as everybody else.

    Raises:
        UserError: it does not, or it knows no steps.
    """
    each = {f"rewards.models.{i}.path" for i, source in enumerate(config.rewards.models) if source.steps == "each"}
    if not made or key not in each:
        return
    known = json.loads(record.read_text())
    if known["kind"] != "process" or known["step_separator"] != config.rewards.steps:
        said = repr(known["step_separator"]) if known["kind"] == "process" else "none: it is no process reward model"
        raise UserError(
            f"{key}: rewards each step, and its steps end with {said}, but rewards.steps is {config.rewards.steps!r}; "
            "make them the same, or leave steps: each out"
        )


def _check_teacher(config: Config, tokenizer: Any) -> None:
    """The teacher speaks the student's vocabulary.

    Raises:
        UserError: it does not.
    """
    teacher = load_tokenizer(config, path=config.distill.teacher, key="distill.teacher")
    if teacher.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"distill.teacher: {config.distill.teacher} has another vocabulary than {config.model.path}, so their "
            "distributions cannot be compared; use a teacher of the same family"
        )
