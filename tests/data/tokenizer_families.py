"""Real tokenizers of the kinds that models come with, trained on a few lines, and chat templates of the usual kinds."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine.config import DataConfig
from engine.data.sources import Rows

CORPUS = [
    "the capital of France is Paris and the capital of Italy is Rome",
    "User: what is it? Assistant: it is what it is, is it not?",
    "<|user|> <|assistant|> user assistant system [INST] [/INST] User: Assistant: System:",
    "Human: how many? Assistant: 1 2 3 12 123, a few lines\n\nand more lines\nof text",
    "think about it, then answer: yes no good bad better worst hello bye",
]
SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
ASCII = [chr(i) for i in range(32, 127)] + ["\n", "▁", "é"]
GPT4_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(*, add_prefix_space: bool = False, split: str | None = None) -> Tokenizer:
    core = Tokenizer(models.BPE())
    if split is None:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    else:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
            ]
        )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def _unigram(scheme: str) -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=ASCII, show_progress=False
    )
    core.train_from_iterator(CORPUS * 4, trainer)
    return core


def _llama2() -> Tokenizer:
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    letters = [letter for letter in ASCII if letter not in "\né"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *fallback], initial_alphabet=letters, show_progress=False
    )
    bare.train_from_iterator(CORPUS, trainer)
    state = json.loads(bare.to_str())
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    model = models.BPE(state["model"]["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(SPECIAL)
    return core


def _word_level() -> Tokenizer:
    words = sorted({word for line in CORPUS for word in line.split()})
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(SPECIAL)
    return core


CORES = {
    "byte-level": _byte_level,
    "byte-level-gpt4-split": lambda: _byte_level(split=GPT4_SPLIT),
    "byte-level-prefix-space": lambda: _byte_level(add_prefix_space=True),
    "unigram-always": lambda: _unigram("always"),
    "unigram-first": lambda: _unigram("first"),
    "llama2": _llama2,
    "word-level": _word_level,
}
LOSSLESS = [name for name in CORES if name != "word-level"]

TEMPLATES: dict[str, tuple[str, str]] = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
    ),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}"
        "{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        "</s>",
    ),
    "no-end": (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "",
    ),
}
"""name -> template, and the token that it ends answers with."""


@cache
def _state(family: str) -> str:
    return CORES[family]().to_str()


def make(family: str, template: str | None = None, *, bos: bool = False, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer; `bos` puts <s> before text, `template` names one of `TEMPLATES` or is one."""
    core = Tokenizer.from_str(_state(family))
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=[token for token in SPECIAL[3:] if token != eos],
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template][0] if template in TEMPLATES else template
    return tokenizer


def rows_of(*rows: dict[str, Any]) -> Rows:
    """Rows from lines 1, 2, ... of a file."""
    return Rows(list(rows), [f"file.jsonl:{i}" for i in range(1, len(rows) + 1)], [])


def data_of(**settings: Any) -> DataConfig:
    """Settings of the section `data`."""
    return DataConfig(train="x", **settings)


def decode(tokenizer: Any, ids: Any) -> str:
    """Text with special tokens."""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def trained_texts(tokenizer: Any, sequence: Any) -> list[str]:
    """The text of each run of masked tokens, read in its place: decoders strip the space before a first word."""
    edges = [i for i in range(1, len(sequence.mask)) if sequence.mask[i] != sequence.mask[i - 1]]
    edges += [len(sequence.mask)] * (len(edges) % 2)
    return [
        decode(tokenizer, sequence.tokens[:end])[len(decode(tokenizer, sequence.tokens[:start])) :]
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]
