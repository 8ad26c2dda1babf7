"""Documents as tokens in a memory-mapped folder, cut into pieces for pretraining.

    rows (column `text`) -> tokens in batches -> [bos] document eos -> tokens.bin, pieces.bin, corpus.json

A piece is a span of one document, at most `max_length` tokens long. The first token of a piece is only seen, the
others are predicted too; the next piece of the same document begins with the last token of this one. So each token but
a document's first is predicted exactly once.

Files: `tokens.bin` int32 [T], document after document; `pieces.bin` int64 [P, 2], start and end of each piece in it;
`corpus.json` counts, what was skipped, and the fingerprint by which a later run knows the folder as its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import DataConfig, SourceConfig, UserError
from engine.data.sources import RowStream, source_files, stream_rows

_FORMAT = 1
_TOKENS, _PIECES, _DESCRIPTION = "tokens.bin", "pieces.bin", "corpus.json"
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 2**20


class Corpus:
    """Pieces of documents, read from disk where they are asked for; `build_corpus` and `open_corpus` make it."""

    num_tokens: int
    """Tokens of all documents, their first and last ones included."""
    num_documents: int
    num_skipped: int
    """Rows left out."""
    skipped: list[str]
    """One `place: reason` for each of the first thousand of them, in order."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.num_tokens = description["num_tokens"]
        self.num_documents = description["num_documents"]
        self.num_skipped = description["num_skipped"]
        self.skipped = description["skipped"]
        self._tokens_T = np.memmap(folder / _TOKENS, np.int32, "r", shape=(self.num_tokens,))
        self._spans_P2 = np.memmap(folder / _PIECES, np.int64, "r", shape=(description["num_pieces"], 2))

    def __len__(self) -> int:
        return len(self._spans_P2)

    def piece(self, index: int) -> np.ndarray:
        """[n] int32, 2 <= n <= max_length: the tokens of a piece, a read-only view of the file."""
        start, end = self._spans_P2[index].tolist()
        return np.asarray(self._tokens_T[start:end])


def build_corpus(source: SourceConfig, tokenizer: Any, folder: Path, *, data: DataConfig, max_length: int) -> Corpus:
    """Tokenise the column `text` of a source into `folder`, or open what an earlier call with the same input wrote.

    The same means: tokenizer, `max_length`, `data.columns`, `data.on_bad_row`, the configuration of the source, and
    path, size and time of change of its files. What a callable reads, or the Hub holds under a name, is not looked
    at: delete the folder when that has changed. A corpus is written beside its place, as `FOLDER.partial`, and takes
    it when it is whole; memory does not grow with it, only with its largest document. One process may build a folder
    at a time.

    Text is only text: a special token spelt out in it is tokenised like any other word.

    Args:
        tokenizer: a fast transformers tokenizer. Its eos ends each document; its bos begins each, if it puts one
            before plain text by itself.
        max_length: most tokens of a piece, at least 2.

    Raises:
        UserError: the source cannot be read, a row is bad and `data.on_bad_row` is "fail", no row is usable;
            `max_length` is 1; the tokenizer is slow or has no eos; `folder` holds something else, or the disk fails.
    """
    if max_length < 2:
        raise UserError(f"training.max_length: {max_length} leaves nothing to predict; set it to 2 or more")
    before, after = _document_ends(tokenizer)
    fingerprint = _fingerprint(source, tokenizer, before + after, data, max_length)
    description = _read_description(folder)
    if description and description["fingerprint"] == fingerprint:
        return Corpus(folder, description)
    partial = folder.with_name(folder.name + ".partial")
    stream = stream_rows(source, columns=data.columns, on_bad_row=data.on_bad_row, required=("text",))
    for place in (folder, partial):
        _refuse_others(place)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counts = _write(stream, tokenizer, partial, before, after, max_length)
        skipped = {"num_skipped": stream.num_bad, "skipped": stream.problems}
        description = {"format": _FORMAT, "fingerprint": fingerprint, **counts, **skipped}
        (partial / _DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(
            f"corpus {str(folder)!r}: cannot be written: {error}; free space or change output_dir"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Corpus(folder, description)


def open_corpus(folder: Path) -> Corpus:
    """The corpus that `build_corpus` wrote.

    Raises:
        UserError: there is none, or not a whole one.
    """
    description = _read_description(folder)
    if description is None:
        raise UserError(f"corpus {str(folder)!r}: there is none here, or it is not whole; build it again")
    return Corpus(folder, description)


def _document_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before and after each document."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer has no tokenizer.json; convert it with transformers' AutoTokenizer and save it")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, which ends a document; set eos_token in tokenizer_config.json")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos] if adds_bos else [], [tokenizer.eos_token_id]


def _fingerprint(source: SourceConfig, tokenizer: Any, ends: list[int], data: DataConfig, max_length: int) -> str:
    """A hash of all that decides what is in the folder (a hash, because arguments of a callable may be secret)."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core = {key: value for key, value in core.items() if key not in ("padding", "truncation")}  # states of other calls
    states = ((Path(file).resolve(), Path(file).stat()) for file in source_files(source))
    parts = {
        "tokenizer": core,
        "ends": ends,
        "source": source.model_dump(mode="json"),
        "files": [[str(file), state.st_size, state.st_mtime_ns] for file, state in states],
        "columns": data.columns,
        "on_bad_row": data.on_bad_row,
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_description(folder: Path) -> dict[str, Any] | None:
    """`corpus.json` of a whole corpus, or None."""
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size for name in (_TOKENS, _PIECES)]
        expected = [4 * description["num_tokens"], 16 * description["num_pieces"]]
        whole = description["format"] == _FORMAT and sizes == expected
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return description if whole else None


def _refuse_others(folder: Path) -> None:
    """A file, or a folder that holds anything but a corpus, is not ours to replace."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"corpus {str(folder)!r}: is a file, must be a folder; name another place")
    held = {file.name for file in folder.iterdir()} if folder.exists() else set()
    others = sorted(held - {_TOKENS, _PIECES, _DESCRIPTION})
    if others:
        raise UserError(f"corpus {str(folder)!r}: the folder holds {others[0]!r}, not a corpus; name another folder")


def _write(
    stream: RowStream, tokenizer: Any, folder: Path, before: list[int], after: list[int], max_length: int
) -> dict[str, int]:
    """Write tokens and pieces of all documents; the counts for `corpus.json`."""
    num_tokens = num_pieces = num_documents = 0
    with open(folder / _TOKENS, "wb") as tokens, open(folder / _PIECES, "wb") as pieces:
        for places, texts in _batches(stream):
            encoded = tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
            )
            for place, ids in zip(places, encoded["input_ids"], strict=True):
                if not ids:
                    stream.reject(place, "column 'text' gives no tokens")
                    continue
                document = np.array(before + ids + after, np.int32)
                spans = _cut(len(document), max_length) + num_tokens
                document.tofile(tokens)
                spans.tofile(pieces)
                num_tokens += len(document)
                num_pieces += len(spans)
                num_documents += 1
    stream.check()
    return {"num_tokens": num_tokens, "num_pieces": num_pieces, "num_documents": num_documents}


def _batches(stream: RowStream) -> Iterator[tuple[list[str], list[str]]]:
    """Places and texts, a number of documents at a time."""
    places: list[str] = []
    texts: list[str] = []
    characters = 0
    for place, row in stream:
        places.append(place)
        texts.append(row["text"])
        characters += len(row["text"])
        if len(texts) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield places, texts
            places, texts, characters = [], [], 0
    if texts:
        yield places, texts


def _cut(length: int, max_length: int) -> np.ndarray:
    """[P, 2] int64: start and end of each piece of a document of at least 2 tokens."""
    starts_P = np.arange(0, length - 1, max_length - 1, dtype=np.int64)
    return np.stack([starts_P, np.minimum(starts_P + max_length, length)], axis=1)
