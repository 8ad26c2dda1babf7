"""Perplexity of unigram and bigram models: what a pretrained language model must beat on the same tokens.

Legend: V vocabulary, N predicted tokens (every token of a piece but its first), each with the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from engine.data.corpus import Corpus

LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Weights of the bigram that are tried."""

_BLOCK = 2**20


def unigram_and_bigram_perplexity(train: Corpus, held_out: Corpus, vocabulary_size: int) -> tuple[float, float]:
    """Perplexity of the predicted held-out tokens under two models counted on the predicted training tokens.

    Unigram: p(w) = (c(w) + 1) / (N + V), add-one smoothing. Bigram: lambda * c(v, w) / c(v) + (1 - lambda) * p(w)
    (Jelinek and Mercer 1980), p(w) alone after a token v never seen there. Lambda is the best of `LAMBDAS` on the last
    tenth of the training pieces under counts of the others; then both models are counted on all of them. Memory grows
    with the number of different bigrams.

    Raises:
        ValueError: a token is not in [0, vocabulary_size), or there are no pieces.
    """
    if not len(train) or not len(held_out):
        raise ValueError("there are no pieces to count")
    last = len(train) - max(1, len(train) // 10)
    first_counts = _count(_pairs(train, range(last), vocabulary_size), vocabulary_size)
    _, losses = _perplexities(first_counts, _pairs(train, range(last, len(train)), vocabulary_size), LAMBDAS)
    best = LAMBDAS[int(np.argmin(losses))]
    counts = _count(_pairs(train, range(len(train)), vocabulary_size), vocabulary_size)
    unigram, (bigram,) = _perplexities(counts, _pairs(held_out, range(len(held_out)), vocabulary_size), (best,))
    return unigram, bigram


@dataclass(frozen=True)
class _Counts:
    unigram: np.ndarray
    """[V] int64: how often each token is predicted."""
    context: np.ndarray
    """[V] int64: how often each token stands before a predicted one."""
    bigrams: np.ndarray
    """[K] int64, sorted: the different bigrams, v * V + w."""
    bigram_counts: np.ndarray
    """[K] int64: how often each occurs."""


def _pairs(corpus: Corpus, pieces: range, vocabulary_size: int) -> Iterator[np.ndarray]:
    """Bigrams v * V + w of these pieces: [n] int64, about a million at a time."""
    block: list[np.ndarray] = []
    size = 0
    for index in pieces:
        tokens = corpus.piece(index).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= vocabulary_size:
            raise ValueError(f"piece {index} has tokens outside a vocabulary of {vocabulary_size}")
        block.append(tokens[:-1] * vocabulary_size + tokens[1:])
        size += len(tokens)
        if size >= _BLOCK:
            yield np.concatenate(block)
            block, size = [], 0
    if block:
        yield np.concatenate(block)


def _count(blocks: Iterable[np.ndarray], vocabulary_size: int) -> _Counts:
    bigrams_K = counts_K = np.zeros(0, np.int64)
    for block in blocks:
        found, found_counts = np.unique(block, return_counts=True)
        bigrams_K, places = np.unique(np.concatenate([bigrams_K, found]), return_inverse=True)
        merged_K = np.zeros(len(bigrams_K), np.int64)
        np.add.at(merged_K, places, np.concatenate([counts_K, found_counts]))
        counts_K = merged_K
    unigram_V, context_V = np.zeros((2, vocabulary_size), np.int64)
    np.add.at(unigram_V, bigrams_K % vocabulary_size, counts_K)
    np.add.at(context_V, bigrams_K // vocabulary_size, counts_K)
    return _Counts(unigram_V, context_V, bigrams_K, counts_K)


def _perplexities(
    counts: _Counts, blocks: Iterable[np.ndarray], lambdas: tuple[float, ...]
) -> tuple[float, list[float]]:
    """Of the unigram, and of the bigram with each lambda."""
    size = len(counts.unigram)
    unigram_p_V = (counts.unigram + 1) / (counts.unigram.sum() + size)
    total, unigram_loss, bigram_losses = 0, 0.0, np.zeros(len(lambdas))
    for block in blocks:
        before_N, unigram_p_N = block // size, unigram_p_V[block % size]
        context_N = counts.context[before_N]
        bigram_p_N = _occurrences(counts, block) / np.maximum(context_N, 1)
        unigram_loss -= np.log(unigram_p_N).sum()
        for i, weight in enumerate(lambdas):
            weight_N = np.where(context_N > 0, weight, 0.0)
            bigram_losses[i] -= np.log(weight_N * bigram_p_N + (1 - weight_N) * unigram_p_N).sum()
        total += len(block)
    return float(np.exp(unigram_loss / total)), np.exp(bigram_losses / total).tolist()


def _occurrences(counts: _Counts, block: np.ndarray) -> np.ndarray:
    """[n] int64: how often each of these bigrams was counted."""
    if not len(counts.bigrams):
        return np.zeros(len(block), np.int64)
    places = np.minimum(np.searchsorted(counts.bigrams, block), len(counts.bigrams) - 1)
    return np.where(counts.bigrams[places] == block, counts.bigram_counts[places], 0)
