"""Documents as pieces of tokens on disk."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from engine.config import DataConfig, UserError
from engine.data import corpus as corpus_module
from engine.data.corpus import Corpus, build_corpus, open_corpus
from engine.data.tokenizer import train_tokenizer

SHAKESPEARE = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt.gz"
DOCUMENTS = ["the cat sat on the mat", "a", "the dog and the cat sat on the log, and that is the end of it. äöü 中"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(DOCUMENTS, vocabulary_size=270)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, documents: list[str]) -> None:
    """Write documents as rows, in the format of the suffix."""
    rows = [{"text": text} for text in documents]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        Path(path).write_bytes(gzip.compress(lines) if path.endswith(".gz") else lines)


def build(tokenizer: Any, path: str, *, max_length: int = 8, folder: str = "corpus", **data: Any) -> Corpus:
    config = DataConfig(train=path, **data)
    return build_corpus(config.train, tokenizer, Path(folder), data=config, max_length=max_length)


def pieces_of(corpus: Corpus) -> list[list[int]]:
    return [corpus.piece(i).tolist() for i in range(len(corpus))]


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of a document, as they should be."""
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def joined(pieces: list[list[int]], eos: int) -> list[list[int]]:
    """Documents put together again from pieces that overlap by a token."""
    documents: list[list[int]] = []
    for piece in pieces:
        if documents and documents[-1][-1] != eos:
            assert documents[-1][-1] == piece[0]
            documents[-1] += piece[1:]
        else:
            documents.append(list(piece))
    return documents


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("max_length", [2, 3, 7, 8, 1000])
def test_every_token_but_a_documents_first_is_predicted_exactly_once(
    tokenizer: PreTrainedTokenizerFast, name: str, max_length: int
) -> None:
    write(name, DOCUMENTS)
    corpus = build(tokenizer, name, max_length=max_length)
    pieces = pieces_of(corpus)
    documents = [whole(tokenizer, text) for text in DOCUMENTS]
    assert joined(pieces, tokenizer.eos_token_id) == documents
    assert all(2 <= len(piece) <= max_length for piece in pieces)
    assert sum(len(piece) - 1 for piece in pieces) == sum(len(document) - 1 for document in documents)
    assert len(pieces) == sum(-(-(len(document) - 1) // (max_length - 1)) for document in documents)
    assert (corpus.num_tokens, corpus.num_documents) == (sum(map(len, documents)), len(documents))
    assert corpus.piece(0).dtype == np.int32


@pytest.mark.parametrize("length", range(2, 12))
def test_pieces_are_as_long_as_they_may_be(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    write("a.jsonl", ["1" * (length - 1)])
    sizes = [len(piece) for piece in pieces_of(build(tokenizer, "a.jsonl", max_length=4))]
    assert sizes == [4] * ((length - 1) // 3) + ([(length - 1) % 3 + 1] if (length - 1) % 3 else [])


def test_text_files_are_a_document_each(tokenizer: PreTrainedTokenizerFast) -> None:
    Path("1.txt").write_text(DOCUMENTS[0])
    Path("2.txt.gz").write_bytes(gzip.compress(DOCUMENTS[2].encode()))
    corpus = build(tokenizer, "*.txt*")
    assert joined(pieces_of(corpus), tokenizer.eos_token_id) == [whole(tokenizer, DOCUMENTS[i]) for i in (0, 2)]


@pytest.mark.parametrize("limits", [(2, 10**6), (10**6, 1)])
def test_documents_keep_their_order_over_batches(
    tokenizer: PreTrainedTokenizerFast, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "_BATCH_DOCUMENTS", limits[0])
    monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", limits[1])
    texts = [f"cat {i}" for i in range(7)]
    write("a.jsonl", texts)
    corpus = build(tokenizer, "a.jsonl")
    assert joined(pieces_of(corpus), tokenizer.eos_token_id) == [whole(tokenizer, text) for text in texts]


def test_a_special_token_spelt_out_in_a_text_is_only_text(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", ["one<|endoftext|>two<|user|>"])
    (piece,) = pieces_of(build(tokenizer, "a.jsonl", max_length=1000))
    assert piece.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(piece[:-1]) == "one<|endoftext|>two<|user|>"
    assert tokenizer("<|user|>")["input_ids"] == tokenizer.convert_tokens_to_ids(["<|user|>"])


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_begins_each_document_where_the_tokenizer_puts_it_before_plain_text(adds_bos: bool) -> None:
    core = train_tokenizer(DOCUMENTS, vocabulary_size=270).backend_tokenizer
    core.add_special_tokens(["<s>"])
    bos = core.token_to_id("<s>")
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|endoftext|>")
    write("a.jsonl", DOCUMENTS)
    pieces = pieces_of(build(tokenizer, "a.jsonl", max_length=1000))
    assert [piece[0] == bos for piece in pieces] == [adds_bos] * len(DOCUMENTS)
    assert [piece[adds_bos:] for piece in pieces] == [whole(tokenizer, text)[adds_bos:] for text in DOCUMENTS]


def test_columns_are_renamed(tokenizer: PreTrainedTokenizerFast) -> None:
    Path("a.jsonl").write_text('{"story": "the cat"}\n')
    assert pieces_of(build(tokenizer, "a.jsonl", columns={"text": "story"})) == [whole(tokenizer, "the cat")]


def test_a_corpus_is_opened_where_it_was_built(tokenizer: PreTrainedTokenizerFast) -> None:
    Path("a.jsonl").write_text('{"text": "the cat"}\n{}\n')
    built = build(tokenizer, "a.jsonl", on_bad_row="skip")
    opened = open_corpus(Path("corpus"))
    assert pieces_of(opened) == pieces_of(built)
    for corpus in (built, opened):
        assert (corpus.num_tokens, corpus.num_documents, corpus.num_skipped) == (built.num_tokens, 1, 1)
        assert corpus.skipped[0].startswith("a.jsonl:2: has no column 'text'")
    with pytest.raises(ValueError, match="read-only"):
        opened.piece(0)[0] = 3


def test_bad_rows_fail_and_leave_an_older_corpus_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", DOCUMENTS)
    before = pieces_of(build(tokenizer, "a.jsonl"))
    Path("1.txt").write_text("fine")
    Path("2.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"1 bad of 2 rows.*\n  2.txt: not UTF-8 text \(byte 3\)"):
        build(tokenizer, "*.txt")
    assert pieces_of(open_corpus(Path("corpus"))) == before
    assert not Path("corpus.partial").exists()


def test_a_document_without_tokens_is_a_bad_row() -> None:
    core: Tokenizer = train_tokenizer(DOCUMENTS, vocabulary_size=270).backend_tokenizer
    core.normalizer = normalizers.Replace("gone", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    write("a.jsonl", ["the cat", "gone"])
    with pytest.raises(UserError, match=r"1 bad of 2 rows.*\n  a.jsonl:2: column 'text' gives no tokens"):
        build(tokenizer, "a.jsonl")
    corpus = build(tokenizer, "a.jsonl", on_bad_row="skip")
    assert (corpus.num_documents, corpus.skipped) == (1, ["a.jsonl:2: column 'text' gives no tokens"])
    write("a.jsonl", ["gone"])
    with pytest.raises(UserError, match="there are no usable rows: all 1 are bad"):
        build(tokenizer, "a.jsonl", on_bad_row="skip")


def test_a_store_that_fits_is_used_again_and_not_read_again(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", DOCUMENTS)
    first = build(tokenizer, "a.jsonl")
    written = Path("corpus/tokens.bin").stat()
    tokenizer(DOCUMENTS, padding=True, truncation=True, max_length=4)  # leaves its settings in the tokenizer
    again = build(tokenizer, "a.jsonl")
    assert (Path("corpus/tokens.bin").stat().st_ino, pieces_of(again)) == (written.st_ino, pieces_of(first))


def test_a_store_is_built_anew_when_anything_it_depends_on_changes(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", ["the cat"])
    Path("b.jsonl").write_text('{"text": "the dog", "story": "a cat"}\n')
    other = train_tokenizer(DOCUMENTS, vocabulary_size=262)

    def built(tokenizer: Any = tokenizer, path: str = "a.jsonl", **options: Any) -> tuple[int, list[list[int]]]:
        corpus = build(tokenizer, path, **options)
        return Path("corpus/corpus.json").stat().st_mtime_ns, pieces_of(corpus)

    for change in (
        {"max_length": 3},
        {"tokenizer": other},
        {"on_bad_row": "skip"},
        {"path": "b.jsonl", "columns": {"text": "story"}},
        {"path": "b.jsonl", "columns": {"text": "text"}},
    ):
        before = built(path=change.get("path", "a.jsonl"))
        changed = built(**change)
        assert changed[0] > before[0], change
        assert built(**change) == changed, change
    assert joined(built()[1], tokenizer.eos_token_id) == [whole(tokenizer, "the cat")]
    write("a.jsonl", ["the end"])
    assert joined(built()[1], tokenizer.eos_token_id) == [whole(tokenizer, "the end")]


def test_a_callable_is_known_by_its_arguments_and_its_file(tokenizer: PreTrainedTokenizerFast) -> None:
    Path("make.py").write_text("def make(n):\n    return [{'text': 'cat'}] * n\n")

    def built(n: int) -> tuple[int, int]:
        corpus = build(tokenizer, {"path": "make.py:make", "arguments": {"n": n}})  # type: ignore[arg-type]
        return Path("corpus/tokens.bin").stat().st_ino, corpus.num_documents

    first = built(2)
    assert built(2) == first
    assert built(3)[1] == 3
    before = built(2)
    stat = os.stat("make.py")
    os.utime("make.py", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000))
    assert built(2)[1] == 2
    assert built(2)[0] != before[0]


@pytest.mark.parametrize("name", ["tokens.bin", "pieces.bin", "corpus.json"])
def test_a_store_that_is_not_whole_is_refused_and_built_anew(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    write("a.jsonl", DOCUMENTS)
    before = pieces_of(build(tokenizer, "a.jsonl"))
    os.truncate(f"corpus/{name}", 16)
    with pytest.raises(UserError, match="'corpus': there is none here, or it is not whole"):
        open_corpus(Path("corpus"))
    assert pieces_of(build(tokenizer, "a.jsonl")) == before


def test_what_a_killed_build_left_behind_does_not_matter(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", DOCUMENTS)
    Path("corpus.partial").mkdir()
    Path("corpus.partial/tokens.bin").write_bytes(b"rest")
    assert len(build(tokenizer, "a.jsonl")) > 0
    assert not Path("corpus.partial").exists()


@pytest.mark.parametrize("name", ["corpus", "corpus.partial"])
def test_a_folder_that_holds_something_else_is_left_alone(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    write("a.jsonl", DOCUMENTS)
    Path(name).mkdir()
    Path(f"{name}/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.txt', not a corpus; name another folder"):
        build(tokenizer, "a.jsonl")
    assert Path(f"{name}/thesis.txt").read_text() == "years of work"


def test_a_place_where_no_folder_can_be_is_explained(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", DOCUMENTS)
    with pytest.raises(UserError, match=r"'a.jsonl': is a file, must be a folder"):
        build(tokenizer, "a.jsonl", folder="a.jsonl")
    with pytest.raises(UserError, match=r"'a.jsonl/corpus': cannot be written"):
        build(tokenizer, "a.jsonl", folder="a.jsonl/corpus")


def test_secrets_in_the_arguments_are_not_written_down(tokenizer: PreTrainedTokenizerFast) -> None:
    Path("make.py").write_text("def make(token):\n    return [{'text': 'cat'}]\n")
    build(tokenizer, {"path": "make.py:make", "arguments": {"token": "hush-hush"}})  # type: ignore[arg-type]
    assert "hush" not in Path("corpus/corpus.json").read_text()


def test_pieces_of_one_token_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", DOCUMENTS)
    with pytest.raises(UserError, match=r"training.max_length: 1 leaves nothing to predict"):
        build(tokenizer, "a.jsonl", max_length=1)


def test_a_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    write("a.jsonl", DOCUMENTS)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="has no eos token"):
        build(bare, "a.jsonl")


def test_a_source_that_is_not_there_is_explained(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"'absent.txt': no such file"):
        build(tokenizer, "absent.txt")


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="the text is not here")
def test_a_book_is_tokenised_whole_and_decoded_without_loss() -> None:
    text = gzip.decompress(SHAKESPEARE.read_bytes()).decode()
    tokenizer = train_tokenizer([text], vocabulary_size=512)
    corpus = build(tokenizer, str(SHAKESPEARE), max_length=256)
    (document,) = joined(pieces_of(corpus), tokenizer.eos_token_id)
    assert len(document) == corpus.num_tokens
    assert tokenizer.decode(document[:-1]) == text
