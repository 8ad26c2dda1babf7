"""A real tokenizer, small enough to be made in the test."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.index0 > 0 and m.role == 'system' %}{{ raise_exception('the system message comes first') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<unk>", "<s>", "</s>", "<system>", "<user>", "<assistant>", "one", "two", "three", "four", "be", "brief"]


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; puts <s> before plain text; no chat template."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def chat_tokenizer(plain_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a chat template, which refuses a system message that is not the first."""
    plain_tokenizer.chat_template = TEMPLATE
    return plain_tokenizer
