"""Several turns as token ids: what the policy said stays as it was sampled, a reply adds the ids that belong behind it.

The chat template is asked once more for each reply, with a marked answer in the place of what was said; the text behind
the mark is what follows any answer. Nothing that was sampled is tokenised again, so nothing can drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.config import DataConfig
from engine.data.conversations import PieceTokenizer
from engine.data.prompts import RowError, apply_template, tokenise_prompt, uses_template

MARK = "7f3a91c5d2"
"""An answer that no template changes and no reply holds."""


class TurnTokens:
    """The ids of openings and replies."""

    def __init__(self, tokenizer: Any, data: DataConfig, tools: Sequence[dict[str, Any]] = ()) -> None:
        """`data` says whether the chat template is used, and with which system prompt; `tools` are JSON schemas.

        Raises:
            UserError: as `uses_template` and `PieceTokenizer`.
        """
        self._tokenizer = tokenizer
        self._templated = uses_template(tokenizer, data)
        self._system_prompt = data.system_prompt
        self._tools = list(tools)
        self._pieces = PieceTokenizer(tokenizer)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = dict.fromkeys([*tokenizer.all_special_tokens, *added])
        self._special = {token: tokenizer.convert_tokens_to_ids(token) for token in special}

    def start(self, messages: list[dict[str, Any]]) -> list[int]:
        """An opening, ready to be continued by the policy.

        Raises:
            RowError: as `tokenise_prompt`.
        """
        if self._templated:
            return tokenise_prompt(messages, self._tokenizer, True, self._system_prompt, self._tools)
        text = "".join(message["content"] for message in messages)
        return tokenise_prompt(text, self._tokenizer, False, None)

    def reply(self, messages: Sequence[dict[str, Any]], said: Sequence[int]) -> list[int]:
        """The ids behind what the policy `said`: the end of its turn, if it left that out, the messages, its next turn.

        Without a chat template, the messages' text as it is.

        Raises:
            RowError: the template refuses the messages, for instance a role that it does not know.
        """
        if not self._templated:
            return self._pieces.continuing("".join(message["content"] for message in messages))
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}
        text = apply_template(
            [question, answer, *messages],
            self._tokenizer,
            self._system_prompt,
            tokenize=False,
            add_generation_prompt=True,
            tools=self._tools,
        )
        _, mark, behind = text.rpartition(MARK)
        if not mark:
            raise RowError("the chat template leaves an answer out when messages follow it")
        bare = behind.lstrip(" ")
        end = next((token for token in self._special if bare.startswith(token)), None)
        if end is None:
            return self._pieces.continuing(behind)
        ids = self._pieces.behind(end, bare[len(end) :])
        return ids if said and said[-1] == self._special[end] else [self._special[end], *ids]
