"""Prompts as token ids: the chat template, the system prompt and the length limit, applied once before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateSyntaxError

from engine.config import DataConfig, UserError
from engine.data.sources import Rows, bad_rows_error


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and the row it came from."""

    token_ids: tuple[int, ...]
    """What the model sees, ready to be continued."""
    prompt: str | list[dict[str, Any]]
    """As in the row: text or messages; of a prompt that was cut, the text that is left."""
    row: dict[str, Any]
    """All columns."""


@dataclass(frozen=True)
class PreparedPrompts:
    """Usable prompts, and why rows were left out."""

    prompts: list[Prompt]
    skipped: list[str]
    """Reasons of `Rows.skipped`, then those found here."""


def build_prompts(
    rows: Rows,
    tokenizer: Any,
    *,
    data: DataConfig,
    max_prompt_tokens: int,
    tools: Sequence[dict[str, Any]] = (),
) -> PreparedPrompts:
    """Tokenise the `prompt` of each row.

    With a chat template (`data.chat_template`), text becomes a user message after `data.system_prompt`, and the ids
    are those of the template itself, with its generation prompt. Without one, text is tokenised with the tokenizer's
    special tokens. `data.on_long_row` "truncate" keeps the last `max_prompt_tokens` ids of plain text; the start of
    a chat template is never cut off.

    Args:
        tokenizer: a transformers tokenizer.
        max_prompt_tokens: longest prompt, in tokens.
        tools: JSON schemas that the chat template is told of.

    Raises:
        UserError: a template is needed and there is none, or it is malformed; a prompt cannot be rendered (unless
            `data.on_bad_row` is "skip") or is too long (unless `data.on_long_row` is "skip", or "truncate" and no
            template is used); none is left.
    """
    templated = uses_template(tokenizer, data)
    prompts: list[Prompt] = []
    unusable: list[str] = []
    too_long: list[str] = []
    skipped: list[str] = []
    for place, row in zip(rows.places, rows.rows, strict=True):
        try:
            ids = tokenise_prompt(row["prompt"], tokenizer, templated, data.system_prompt, tools)
        except RowError as error:
            unusable.append(f"{place}: {error}")
            skipped.append(unusable[-1])
            continue
        prompt = row["prompt"]
        if len(ids) > max_prompt_tokens and data.on_long_row == "truncate" and not templated:
            ids = ids[-max_prompt_tokens:]
            prompt = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        elif len(ids) > max_prompt_tokens:
            too_long.append(f"{place}: the prompt has {len(ids)} tokens, the limit is {max_prompt_tokens}")
            skipped.append(too_long[-1])
            continue
        prompts.append(Prompt(tuple(ids), prompt, row))
    if unusable and data.on_bad_row == "fail":
        raise bad_rows_error("prompts", unusable, len(rows.rows))
    if too_long and data.on_long_row != "skip":
        raise _too_long_error(too_long, len(rows.rows), data, templated)
    if not prompts:
        shown = "".join(f"\n  {reason}" for reason in skipped[:10])
        raise UserError(f"no prompt is left: all {len(rows.rows)} rows were skipped{shown}")
    return PreparedPrompts(prompts, [*rows.skipped, *skipped])


def _too_long_error(too_long: list[str], total: int, data: DataConfig, templated: bool) -> UserError:
    shown = "".join(f"\n  {reason}" for reason in too_long[:10])
    what = f"{len(too_long)} of {total} prompts are too long"
    if data.on_long_row == "truncate":
        what += ", and data.on_long_row: truncate would cut into the chat template"
    choices = "skip" if templated else "skip or truncate"
    return UserError(
        f"{what}; shorten them, raise data.max_prompt_tokens (or rollout.max_model_len), or set "
        f"data.on_long_row: {choices}{shown}"
    )


class RowError(Exception):
    """This row cannot be used; the message says why."""


def uses_template(tokenizer: Any, data: DataConfig) -> bool:
    """Whether prompts go through the tokenizer's chat template.

    Raises:
        UserError: `data` asks for a template (`chat_template: always`, a `system_prompt`) and none is used.
    """
    has_template = bool(tokenizer.chat_template)
    if data.chat_template == "always" and not has_template:
        raise UserError("data.chat_template: is always, but the tokenizer has no chat template; use auto or never")
    templated = has_template and data.chat_template != "never"
    if data.system_prompt is not None and not templated:
        why = "data.chat_template is never" if has_template else "the tokenizer has no chat template"
        raise UserError(f"data.system_prompt: needs a chat template, but {why}; put the text into the prompts instead")
    return templated


def tokenise_prompt(
    prompt: Any, tokenizer: Any, templated: bool, system_prompt: str | None, tools: Sequence[dict[str, Any]] = ()
) -> list[int]:
    """Text or messages as what the model is given to continue; `tools` are JSON schemas for the template.

    Raises:
        RowError: the template refuses them, there are messages but no template, or they give no tokens.
        UserError: the template is malformed.
    """
    if templated:
        messages = as_messages(prompt)
        ids = apply_template(messages, tokenizer, system_prompt, tokenize=True, add_generation_prompt=True, tools=tools)
    elif isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # a tokenizer that ends every text, while this one is to be continued
    else:
        raise RowError(
            "the prompt is a list of messages, which needs a chat template, and none is used; give text, a tokenizer "
            "with a template, or data.chat_template: auto"
        )
    if not ids:
        raise RowError("the prompt gives no tokens")
    return list(ids)


def as_messages(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Text as a user message; messages as they are."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def apply_template(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    system_prompt: str | None,
    *,
    tokenize: bool,
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]] = (),
) -> Any:
    """Messages as ids (`tokenize`) or as text, after the system prompt unless they begin with one of their own.

    The template is told of `tools` (JSON schemas), if there are any.

    Raises:
        RowError: the template refuses the messages.
        UserError: the template is malformed.
    """
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=list(tools) or None,
            tokenize=tokenize,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
        )
    except TemplateSyntaxError as error:
        raise UserError(f"the tokenizer's chat template is malformed (line {error.lineno}): {error}") from error
    except Exception as error:  # a template is a program: it raises what it likes
        raise RowError(f"the chat template failed: {type(error).__name__}: {error}") from error
