"""Pairs and judged answers as token sequences."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import UserError
from engine.data.examples import PreparedExamples, to_batch
from engine.data.preferences import build_pairs, build_unpaired
from engine.data.prompts import build_prompts
from tests.data.tokenizer_families import LOSSLESS, data_of, decode, make, rows_of, trained_texts

PAIR = {"prompt": "what is it?", "chosen": " good", "rejected": " bad bad"}
START = [
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "it is"},
    {"role": "user", "content": "and now?"},
]
GOOD, BAD = ({"role": "assistant", "content": content} for content in ("good", "bad"))
HH = "\n\nHuman: what is it?\n\nAssistant: it is\n\nHuman: and now?\n\nAssistant:"
HH_FILE = Path(__file__).parents[3] / "shared/data/hh_harmless_1500.jsonl.gz"


def chatml() -> Any:
    return make("byte-level", "chatml", eos="<|im_end|>")


def build(tokenizer: Any, *rows: dict[str, Any], limit: int = 500, score_last: bool = False, **data: Any) -> Any:
    return build_pairs(rows_of(*rows), tokenizer, data=data_of(**data), max_length=limit, score_last=score_last)


def texts(tokenizer: Any, prepared: PreparedExamples) -> list[str]:
    return [text for e in prepared.examples for s in e.sequences for text in trained_texts(tokenizer, s)]


def generated_from(tokenizer: Any, prompt: Any) -> tuple[int, ...]:
    prepared = build_prompts(rows_of({"prompt": prompt}), tokenizer, data=data_of(), max_prompt_tokens=500)
    return prepared.prompts[0].token_ids


@pytest.mark.parametrize("template", [None, "chatml"])
@pytest.mark.parametrize("family", LOSSLESS)
def test_a_pair_is_the_prompt_with_either_answer(family: str, template: str | None) -> None:
    end = "<|im_end|>" if template else "</s>"
    tokenizer = make(family, template, bos=True, eos=end)
    prepared = build(tokenizer, PAIR)
    (example,) = prepared.examples
    assert texts(tokenizer, prepared) == [f" good{end}", f" bad bad{end}"]
    given = generated_from(tokenizer, PAIR["prompt"])
    assert example.prompt.token_ids == given
    assert example.prompt.prompt == PAIR["prompt"]
    assert all(tuple(s.tokens[: len(given)]) == given for s in example.sequences)
    assert (example.labels, example.row, prepared.annotators) == ({}, PAIR, ())


def test_messages_without_a_prompt_share_their_beginning() -> None:
    tokenizer = chatml()
    prepared = build(tokenizer, {"chosen": [*START, GOOD], "rejected": [*START, BAD]})
    assert texts(tokenizer, prepared) == ["good<|im_end|>", "bad<|im_end|>"]
    assert prepared.examples[0].prompt.token_ids == generated_from(tokenizer, START)


def test_conversations_that_part_early_train_all_later_answers() -> None:
    tokenizer = chatml()
    prepared = build(tokenizer, {"chosen": [*START[:1], GOOD, START[2], GOOD], "rejected": [*START[:1], BAD]})
    assert texts(tokenizer, prepared) == ["good<|im_end|>", "good<|im_end|>", "bad<|im_end|>"]
    assert prepared.examples[0].prompt.token_ids == generated_from(tokenizer, START[:1])


def test_one_conversation_may_be_the_beginning_of_the_other() -> None:
    tokenizer = chatml()
    prepared = build(tokenizer, {"chosen": [*START, GOOD], "rejected": START[:2]})
    assert texts(tokenizer, prepared) == ["it is<|im_end|>", "good<|im_end|>", "it is<|im_end|>"]


def test_a_prompt_in_text_beside_whole_conversations_is_not_repeated() -> None:
    tokenizer = chatml()
    row = {"prompt": "what is it?", "chosen": [START[0], GOOD], "rejected": [START[0], BAD]}
    prepared = build(tokenizer, row)
    assert texts(tokenizer, prepared) == ["good<|im_end|>", "bad<|im_end|>"]
    given = generated_from(tokenizer, START[:1])
    assert prepared.examples[0].prompt.token_ids == given
    for sequence in prepared.examples[0].sequences:
        assert tuple(sequence.tokens[: len(given)]) == given
        assert not sequence.mask[: len(given)].any()
        assert sequence.mask[len(given)]


def test_messages_may_answer_a_prompt() -> None:
    tokenizer = chatml()
    for prompt in (START, "what is it?"):
        prepared = build(tokenizer, {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]})
        assert texts(tokenizer, prepared) == ["good<|im_end|>", "bad<|im_end|>"]
        assert prepared.examples[0].prompt.token_ids == generated_from(tokenizer, prompt)


@pytest.mark.parametrize(("chosen", "rejected"), [(" good", " bad"), (" good one", " good two"), (" no", " not")])
def test_a_dialogue_in_text_is_split_after_the_last_common_turn(chosen: str, rejected: str) -> None:
    row = {"chosen": HH + chosen, "rejected": HH + rejected}
    plain = make("byte-level")
    prepared = build(plain, row)
    assert texts(plain, prepared) == [chosen + "</s>", rejected + "</s>"]
    assert prepared.examples[0].prompt.prompt == HH
    assert prepared.examples[0].prompt.token_ids == generated_from(plain, HH)
    templated = chatml()
    prepared = build(templated, row)
    assert texts(templated, prepared) == [chosen.strip() + "<|im_end|>", rejected.strip() + "<|im_end|>"]
    assert prepared.examples[0].prompt.token_ids == generated_from(templated, START)
    assert texts(templated, build(templated, row, chat_template="never")) == [
        f"{a}<|im_end|>" for a in (chosen, rejected)
    ]


@pytest.mark.skipif(not HH_FILE.exists(), reason="the sample of HH-RLHF is not there")
@pytest.mark.parametrize("template", [None, "chatml"])
def test_real_dialogues_come_back_whole(template: str | None) -> None:
    tokenizer = make("byte-level", template, eos="<|im_end|>")
    with gzip.open(HH_FILE, "rt") as lines:
        rows = [json.loads(line) for line in lines][:300]
    prepared = build(tokenizer, *rows, limit=10**6, on_bad_row="skip")
    assert len(prepared.examples) + len(prepared.skipped) == len(rows)
    assert all("is empty" in reason for reason in prepared.skipped)
    assert len(prepared.examples) >= len(rows) - 4
    for example in prepared.examples:
        for name, sequence in zip(("chosen", "rejected"), example.sequences, strict=True):
            (answer,) = trained_texts(tokenizer, sequence)
            last = example.row[name].rsplit("\n\nAssistant:", 1)[1]
            assert answer == (last.strip() if template else last) + "<|im_end|>"
            if template is None:
                assert decode(tokenizer, sequence.tokens) == example.row[name] + "<|im_end|>"


@pytest.mark.parametrize("template", [None, "chatml", "zephyr"])
def test_a_reward_model_scores_the_end_token_and_nothing_after_it(template: str | None) -> None:
    end = "<|im_end|>" if template == "chatml" else "</s>"
    tokenizer = make("byte-level", template, eos=end)
    for sequence in build(tokenizer, PAIR, score_last=True).examples[0].sequences:
        assert list(sequence.mask) == [False] * (len(sequence.mask) - 1) + [True]
        assert sequence.tokens[-1] == tokenizer.eos_token_id


def test_a_margin_is_a_label_of_both() -> None:
    tokenizer = make("byte-level")
    prepared = build(tokenizer, PAIR | {"margin": 2}, PAIR, PAIR | {"margin": "0.5"})
    assert [e.labels for e in prepared.examples] == [{"margin": (m, m)} for m in (2.0, 0.0, 0.5)]
    assert to_batch(prepared.examples).labels["margin"].tolist() == [2, 2, 0, 0, 0.5, 0.5]


def test_annotators_are_numbered_in_sorted_order() -> None:
    tokenizer = make("byte-level")
    prepared = build(tokenizer, *(PAIR | {"annotator": who} for who in ("eve", 7, "ann", "eve")))
    assert prepared.annotators == ("7", "ann", "eve")
    assert [e.labels["annotator"] for e in prepared.examples] == [(2, 2), (0, 0), (1, 1), (2, 2)]
    prepared = build(tokenizer, PAIR | {"annotator": "eve"}, PAIR)
    assert (prepared.annotators, prepared.examples[0].labels) == ((), {})


def test_both_answers_are_cut_at_their_end() -> None:
    tokenizer = make("byte-level")
    given = generated_from(tokenizer, PAIR["prompt"])
    example = build(tokenizer, PAIR, limit=len(given) + 2, on_long_row="truncate").examples[0]
    whole = build(tokenizer, PAIR).examples[0]
    for cut, full in zip(example.sequences, whole.sequences, strict=True):
        assert list(cut.tokens) == list(full.tokens[: len(given) + 2])
        assert list(cut.mask) == [False] * len(given) + [True] * 2
    scored = build(tokenizer, PAIR, limit=len(given) + 2, on_long_row="truncate", score_last=True).examples[0]
    assert list(scored.sequences[1].mask) == [False] * (len(given) + 1) + [True]


def test_a_pair_that_the_cut_makes_the_same_is_a_bad_row() -> None:
    tokenizer = make("byte-level")
    row = {"prompt": "what is it?", "chosen": " good good", "rejected": " good bad"}
    limit = len(generated_from(tokenizer, row["prompt"])) + 1
    with pytest.raises(UserError, match=f"jsonl:1: cut to {limit} tokens, its answers are all the same"):
        build(tokenizer, row, limit=limit, on_long_row="truncate")


BAD_ROWS = [
    ({"prompt": "x", "chosen": "y"}, "a column is missing: 'rejected'; its columns: prompt, chosen"),
    (PAIR | {"chosen": None}, "a column is empty: 'chosen'"),
    (PAIR | {"chosen": " "}, "column 'chosen' is empty"),
    (PAIR | {"rejected": PAIR["chosen"]}, "columns 'chosen' and 'rejected' are the same"),
    (PAIR | {"rejected": [BAD]}, "must both be text, or both messages"),
    (PAIR | {"prompt": ""}, "column 'prompt' is empty"),
    (PAIR | {"margin": "much"}, "column 'margin' must be a number, is 'much'"),
    (PAIR | {"margin": float("nan")}, "column 'margin' must be a number"),
    (
        {"chosen": "good", "rejected": "bad"},
        "there is no column 'prompt', and columns 'chosen' and 'rejected' are no dia",
    ),
    ({"chosen": HH + " ", "rejected": HH + " bad"}, "the answer in column 'chosen' is empty"),
    ({"chosen": HH + " good", "rejected": HH + " bad\n\nHuman: why?"}, "column 'rejected' goes on after the answer"),
    ({"chosen": "hello" + HH + " good", "rejected": "hello" + HH + " bad"}, "must begin with"),
    ({"chosen": [START[0], GOOD], "rejected": [START[2], BAD]}, "no beginning in common that the assistant answers"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "no beginning in common that the assistant answers"),
    ({"prompt": START, "chosen": [*START, GOOD], "rejected": [*START, BAD]}, "first message must be the assistant's"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_pair_is_told_or_skipped(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        build(chatml(), PAIR, row)
    assert "preference pairs: 1 bad of 2 rows" in str(caught.value)
    assert f"file.jsonl:2: {reason}" in str(caught.value) or reason in str(caught.value)
    prepared = build(chatml(), PAIR, row, on_bad_row="skip")
    assert [e.row for e in prepared.examples] == [PAIR]


def judge(tokenizer: Any, *rows: dict[str, Any], **data: Any) -> PreparedExamples:
    return build_unpaired(rows_of(*rows), tokenizer, data=data_of(**data), max_length=500)


@pytest.mark.parametrize(
    ("label", "number"), [(True, 1), (False, 0), (1, 1), (0, 0), ("true", 1), ("False", 0), ("1", 1)]
)
def test_a_judged_answer_is_desirable_or_not(label: Any, number: float) -> None:
    tokenizer = make("byte-level")
    prepared = judge(tokenizer, {"prompt": "what is it?", "completion": " good", "label": label})
    assert texts(tokenizer, prepared) == [" good</s>"]
    assert prepared.examples[0].labels == {"desirable": (number,)}
    assert prepared.examples[0].prompt.token_ids == generated_from(tokenizer, "what is it?")


def test_a_pair_is_two_judged_answers() -> None:
    tokenizer = make("byte-level")
    prepared = judge(tokenizer, PAIR, {"prompt": "what?", "completion": " bye", "label": 0})
    assert texts(tokenizer, prepared) == [" good</s>", " bad bad</s>", " bye</s>"]
    assert [e.labels["desirable"] for e in prepared.examples] == [(1,), (0,), (0,)]
    assert all(len(e.sequences) == 1 for e in prepared.examples)
    assert np.array_equal(to_batch(prepared.examples).group_ids, [0, 1, 2])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "completion": "y"}, "a column is missing: 'label'"),
        ({"prompt": "x", "completion": "y", "label": 0.5}, "column 'label' must be true or false, or 1 or 0, is 0.5"),
        ({"prompt": "x", "completion": "y", "label": "maybe"}, "column 'label' must be a number, is 'maybe'"),
        ({"completion": "y", "label": True}, "a column is missing: 'prompt'"),
        ({"prompt": "x"}, "a column is missing: 'completion'"),
    ],
)
def test_a_bad_judgement_is_told(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match="judged answers: 1 bad of 1 rows") as caught:
        judge(make("byte-level"), row)
    assert f"file.jsonl:1: {reason}" in str(caught.value)
