"""Preflight: everything that can be found wrong with a run before Ray, a model or a GPU starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config import Config, SourceConfig, UserError
from engine.data.prompts import Prompt, build_prompts
from engine.data.sources import load_rows
from engine.rewards.contract import resolve_all


@dataclass(frozen=True)
class Plan:
    """A run that passed the checks."""

    train_prompts: list[Prompt]
    held_out_prompts: list[Prompt]
    skipped: list[str]
    """Rows left out, each with its reason."""


def prepare(config: Config) -> Plan:
    """Check model folder, tokenizer, reward functions and every data row.

    Raises:
        UserError: with what is wrong, where, and how to mend it.
    """
    _check_model(config)
    resolve_all(config.rewards)
    tokenizer = _load_tokenizer(config)
    skipped: list[str] = []

    def prompts(source: SourceConfig) -> list[Prompt]:
        rows = load_rows(source, columns=config.data.columns, on_bad_row=config.data.on_bad_row)
        prepared = build_prompts(rows, tokenizer, data=config.data, max_prompt_tokens=config.max_prompt_tokens)
        skipped.extend(prepared.skipped)
        return prepared.prompts

    train = prompts(config.data.train)
    held_out = prompts(config.data.evaluation)[: config.evaluation.prompts] if config.data.evaluation else []
    return Plan(train, held_out, skipped)


def _check_model(config: Config) -> None:
    """The folder is one, and its context holds `rollout.max_model_len`. A Hub name is checked with its tokenizer."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        slashes = config.model.path.count("/")
        if folder.is_absolute() or slashes > 1 or (slashes == 1 and folder.parent.is_dir()):
            raise UserError(
                f"model.path: {config.model.path}: no such folder; give a folder in Hugging Face format or a Hub name"
            )
        return
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model.path: {folder} has no config.json; give a folder in Hugging Face format")
    try:
        context = json.loads(file.read_text()).get("max_position_embeddings")
    except (ValueError, AttributeError):
        raise UserError(f"model.path: {file} is not a JSON object; save the model again") from None
    if isinstance(context, int) and config.rollout.max_model_len > context:
        raise UserError(
            f"rollout.max_model_len: {config.rollout.max_model_len} is over the {context} tokens that the model was "
            f"made for (max_position_embeddings in {file}); lower it"
        )
    _check_weights(folder)


def _check_weights(folder: Path) -> None:
    """Every weight file is there and whole, going by its header."""
    names = {file.name for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names |= {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"model.path: {index} is no whole index (a JSON object with weight_map); download or save the model "
                "again"
            ) from None
    if not names:
        raise UserError(f"model.path: {folder} holds no *.safetensors; save the model with save_pretrained")
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"model.path: {folder / name} is no whole safetensors file ({error}); download or save the model again"
            ) from None


def _load_tokenizer(config: Config) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # transformers raises a dozen kinds here
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(config.model.path).is_dir():
            message = f"no tokenizer could be loaded: {why}; check the folder's tokenizer files"
        else:
            message = (
                f"no such folder, and no tokenizer could be loaded from the Hub under that name: {why}; give an "
                f"existing folder (paths start at the working directory {Path.cwd()}), or check the Hub name's "
                "spelling and the network"
            )
        raise UserError(f"model.path: {config.model.path}: {message}") from None
