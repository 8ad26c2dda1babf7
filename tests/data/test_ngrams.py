"""Unigram and bigram perplexity, against a loop that follows the definition."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.config import DataConfig
from engine.data import ngrams
from engine.data.corpus import Corpus, build_corpus
from engine.data.ngrams import LAMBDAS, unigram_and_bigram_perplexity
from engine.data.tokenizer import train_tokenizer

SIZE = 270
Pieces = list[list[int]]


def corpus_of(folder: Path, name: str, texts: list[str], *, max_length: int) -> Corpus:
    """A real corpus; all of these tests use the same tokenizer."""
    tokenizer = train_tokenizer(["the cat sat on the mat " * 9], vocabulary_size=SIZE)
    for i, text in enumerate(texts):
        (folder / f"{name}-{i:04}.txt").write_text(text)
    data = DataConfig(train=str(folder / f"{name}-*.txt"))
    return build_corpus(data.train, tokenizer, folder / name, data=data, max_length=max_length)


def pieces_of(corpus: Corpus) -> Pieces:
    return [corpus.piece(i).tolist() for i in range(len(corpus))]


def pairs_of(pieces: Pieces) -> list[tuple[int, int]]:
    return [(piece[i - 1], piece[i]) for piece in pieces for i in range(1, len(piece))]


def naive(train: Pieces, held_out: Pieces, weight: float) -> tuple[float, float]:
    """Both perplexities with a given lambda, by the definition."""
    pairs = pairs_of(train)
    words, contexts, bigrams = Counter(w for _, w in pairs), Counter(v for v, _ in pairs), Counter(pairs)
    unigram_loss = bigram_loss = 0.0
    for v, w in pairs_of(held_out):
        unigram = (words[w] + 1) / (len(pairs) + SIZE)
        bigram = weight * bigrams[v, w] / contexts[v] + (1 - weight) * unigram if contexts[v] else unigram
        unigram_loss -= math.log(unigram)
        bigram_loss -= math.log(bigram)
    total = len(pairs_of(held_out))
    return math.exp(unigram_loss / total), math.exp(bigram_loss / total)


def naive_best(train: Pieces) -> float:
    """Lambda by the definition."""
    last = max(1, len(train) // 10)
    return min(LAMBDAS, key=lambda weight: naive(train[:-last], train[-last:], weight)[1])


def random_texts(seed: int, count: int) -> list[str]:
    """Words in an order that a bigram model can learn in part."""
    rng = np.random.default_rng(seed)
    words = ["the cat", " sat on", " the mat", ". ", "a dog", " and ", "9", "ß"]
    return [
        "".join(words[i] for i in np.cumsum(rng.choice([1, 1, 1, 2, 5], size=40)) % len(words)) for _ in range(count)
    ]


@pytest.mark.parametrize(("count", "max_length"), [(1, 200), (2, 100), (30, 9), (30, 100)])
@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_both_perplexities_follow_the_definition(
    tmp_path: Path, count: int, max_length: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngrams, "_BLOCK", block)
    train = corpus_of(tmp_path, "train", random_texts(0, count), max_length=max_length)
    held_out = corpus_of(tmp_path, "held_out", [*random_texts(1, 5), "zzz never seen"], max_length=max_length)
    expected = naive(pieces_of(train), pieces_of(held_out), naive_best(pieces_of(train)))
    assert unigram_and_bigram_perplexity(train, held_out, SIZE) == pytest.approx(expected, rel=1e-9)


def test_lambda_follows_the_training_text_and_not_the_held_out_one(tmp_path: Path) -> None:
    regular = corpus_of(tmp_path, "regular", ["abcdefghij" * 9] * 40, max_length=50)
    rng = np.random.default_rng(0)
    letters = ["".join(rng.choice([*map(chr, range(58, 127))], size=90)) for _ in range(40)]
    random = corpus_of(tmp_path, "random", letters, max_length=50)
    assert naive_best(pieces_of(regular)) == LAMBDAS[-1]
    assert naive_best(pieces_of(random)) < LAMBDAS[-1]
    got = unigram_and_bigram_perplexity(regular, random, SIZE)
    assert got == pytest.approx(naive(pieces_of(regular), pieces_of(random), LAMBDAS[-1]), rel=1e-9)


def test_a_bigram_model_sees_order_and_a_unigram_model_does_not(tmp_path: Path) -> None:
    train = corpus_of(tmp_path, "train", ["qxjz" * 50] * 20, max_length=64)
    unigram, bigram = unigram_and_bigram_perplexity(train, train, SIZE)
    assert 4 < unigram < 5
    assert 1 < bigram < 1.2


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    train = corpus_of(tmp_path, "train", ["the cat"], max_length=64)
    with pytest.raises(ValueError, match="piece 0 has tokens outside a vocabulary of 20"):
        unigram_and_bigram_perplexity(train, train, 20)
