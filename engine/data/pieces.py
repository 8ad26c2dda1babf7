"""Pieces of documents as examples: every token but a piece's first is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from engine.data.corpus import Corpus
from engine.data.examples import Example, TokenSequence


class Pieces(Sequence[Example]):
    """A corpus as examples, made when they are asked for."""

    def __init__(self, corpus: Corpus, count: int | None = None) -> None:
        """The first `count` pieces; None is all."""
        self._corpus = corpus
        self._count = len(corpus) if count is None else min(count, len(corpus))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        tokens = np.asarray(self._corpus.piece(index))
        mask = np.ones(len(tokens), bool)
        mask[0] = False
        return Example(sequences=(TokenSequence(tokens, mask),), labels={}, row={}, prompt=None)
