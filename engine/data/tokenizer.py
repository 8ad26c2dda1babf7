"""Trains the tokenizer of a model that starts from random weights: byte-level BPE with a chat template.

A conversation reads

    <|system|>TEXT<|user|>TEXT<|assistant|>TEXT<|endoftext|><|user|>TEXT<|assistant|>TEXT<|endoftext|>

A turn of the system or the user ends where the next begins, one of the assistant with `<|endoftext|>`, the token that
also ends a document of the pretraining text: whatever ends an answer was seen in pretraining, and one stop token serves
both. Only special tokens stand between turns, so no token ever spans two of them, and the tokens of a conversation are
those of its beginning followed by those of the rest. With 256 bytes these are 261 tokens; all others are learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.config import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (END_OF_TEXT, PAD, *ROLES)
"""In the order of their ids, from 0."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' and not loop.first -%}"
    "{{- raise_exception('the system message must come first') -}}"
    "{%- elif message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' ~ message.role ~ ' is none of system, user, assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message.role ~ '|>' ~ message.content -}}"
    "{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_SMALLEST = 256 + len(SPECIAL_TOKENS)
_CHUNK = 2**16
_MIN_FREQUENCY = 2


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE (Sennrich et al., arXiv:1508.07909; on bytes: Radford et al. 2019) from texts.

    Any text is encoded and decoded without loss: every byte is a token, nothing is normalised, no space is put in
    front. Digits are tokens of their own (as in LLaMA, arXiv:2302.13971), so that numbers of any length are written in
    one way. The result depends on the texts alone, not on their order or the number of threads. No special tokens are
    put around plain text.

    Args:
        texts: documents; read once and not held.
        vocabulary_size: most tokens, special ones included; fewer come out when fewer pairs occur at least twice.

    Raises:
        UserError: there is no text. Errors of `texts` pass through.
        ValueError: `vocabulary_size` cannot hold the bytes and the special tokens.
    """
    if vocabulary_size < _SMALLEST:
        raise ValueError(f"vocabulary_size is {vocabulary_size}, but bytes and special tokens are {_SMALLEST}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_chunks(texts), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """The texts in pieces: training on a text takes many times its memory, and a cut word here and there is no loss."""
    empty = True
    for text in texts:
        for start in range(0, len(text), _CHUNK):
            empty = False
            yield text[start : start + _CHUNK]
    if empty:
        raise UserError("the tokenizer cannot be trained: there is no text; check data.train and data.columns")
