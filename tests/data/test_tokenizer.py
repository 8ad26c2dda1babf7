"""The tokenizer that is trained on a corpus, and its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.config import NewModelConfig, UserError
from engine.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = [
    "the cat sat on the mat and the dog sat on the log",
    "the end of the story: there were 1000 cats and 1000 dogs",
    "a second story, about the cat and the mat",
]
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " what is 12 + 30?\n"},
    {"role": "assistant", "content": "\n42"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "the end "},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocabulary_size=300)


def ids_of(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)


@given(text=st.text())
def test_any_text_is_encoded_and_decoded_without_loss(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_frequent_words_become_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("the cat") == ["the", "Ġcat"]


def test_every_digit_is_a_token_however_often_a_number_occurs(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("1000 cats, 17") == ["1", "0", "0", "0", "Ġcat", "s", ",", "Ġ", "1", "7"]


def test_nothing_is_put_around_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("the")["input_ids"] == tokenizer.convert_tokens_to_ids(["the"])


def test_the_vocabulary_size_is_an_upper_bound() -> None:
    assert len(train_tokenizer(TEXTS, vocabulary_size=270)) == 270
    small = train_tokenizer(["abcd"], vocabulary_size=1000)
    assert len(small) == 256 + len(SPECIAL_TOKENS)
    assert small.decode(small("abcd")["input_ids"]) == "abcd"


def test_the_least_size_of_the_configuration_is_enough() -> None:
    least = next(m.ge for m in NewModelConfig.model_fields["vocabulary_size"].metadata)
    assert len(train_tokenizer(TEXTS, vocabulary_size=least)) == least


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary_size is 260, but bytes and special tokens are 261"):
        train_tokenizer(TEXTS, vocabulary_size=260)


def test_the_result_depends_on_the_texts_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(TEXTS[::-1]), vocabulary_size=300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    other = train_tokenizer(["entirely other words, words, words"], vocabulary_size=300)
    assert other.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_corpus_without_text_is_refused(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"there is no text; check data.train"):
        train_tokenizer(texts, vocabulary_size=300)


def test_an_error_of_the_corpus_passes_through() -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS
        raise UserError("row 4 is bad")

    with pytest.raises(UserError, match="row 4 is bad"):
        train_tokenizer(texts(), vocabulary_size=300)


def test_a_long_document_is_learned_from_to_its_end() -> None:
    text = "a b c " * 20_000 + "the cat sat " * 2_000
    assert train_tokenizer([text], vocabulary_size=300).tokenize("the cat") == ["the", "Ġcat"]


def test_a_conversation_is_written_with_one_special_token_per_turn_and_an_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == (
        "<|system|>be brief<|user|> what is 12 + 30?\n<|assistant|>\n42<|endoftext|>"
        "<|user|>and then<|assistant|>the end <|endoftext|>"
    )


def test_an_assistant_turn_ends_with_eos_and_generation_starts_after_its_marker(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert ids_of(tokenizer, TURNS)[-1] == tokenizer.eos_token_id
    asked = ids_of(tokenizer, TURNS[:2], add_generation_prompt=True)
    assert asked[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert asked[:-1] == ids_of(tokenizer, TURNS[:2])


def test_the_tokens_of_a_turn_do_not_depend_on_its_neighbours(tokenizer: PreTrainedTokenizerFast) -> None:
    alone = [token for turn in TURNS for token in ids_of(tokenizer, [turn])]
    assert ids_of(tokenizer, TURNS) == alone


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([TURNS[1], TURNS[0]], "the system message must come first"),
        ([{"role": "tool", "content": "42"}], "role tool is none of system, user, assistant"),
    ],
)
def test_turns_that_the_template_cannot_write_are_refused(
    tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], reason: str
) -> None:
    with pytest.raises(TemplateError, match=reason):
        ids_of(tokenizer, turns)


def test_special_tokens_have_the_first_ids_and_are_left_out_of_decoded_answers(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|endoftext|>", "<|pad|>", None)
    assert tokenizer.decode(ids_of(tokenizer, TURNS[-1:]), skip_special_tokens=True) == "the end "


def test_a_saved_tokenizer_is_loaded_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids_of(loaded, TURNS) == ids_of(tokenizer, TURNS)
