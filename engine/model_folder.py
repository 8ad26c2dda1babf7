"""Model folders before anything loads them: is there one, is it whole, what is its tokenizer; and making a new one."""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from engine.config import Config, NewModelConfig, UserError
from engine.config_file import STAGE_PREFIX
from engine.data.sources import stream_rows
from engine.data.tokenizer import train_tokenizer


def check_model(config: Config, *, weights: bool = True) -> None:
    """The folder is one, and its context holds the longest sample. A Hub name is checked with its tokenizer.

    Raises:
        UserError: it is not, or (with `weights`) a weight file is missing or torn.
    """
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
    limits = {"rollout.max_model_len": config.rollout.max_model_len} if config.generates else {}
    if config.stage != "rl":
        limits["training.max_length"] = config.training.max_length
    for key, limit in limits.items():
        if isinstance(context, int) and limit > context:
            raise UserError(
                f"{key}: {limit} is over the {context} tokens that the model was made for (max_position_embeddings "
                f"in {file}); lower it"
            )
    if weights:
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


def load_tokenizer(config: Config, *, path: str | None = None, key: str = "model.path") -> Any:
    """The tokenizer of the run's model, or of the one at `path`; `key` is the setting to name when there is none.

    Raises:
        UserError: none could be loaded.
    """
    path = path or config.model.path
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # transformers raises a dozen kinds here
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(path).is_dir():
            message = f"no tokenizer could be loaded: {why}; check the folder's tokenizer files"
        else:
            message = (
                f"no such folder, and no tokenizer could be loaded from the Hub under that name: {why}; give an "
                f"existing folder (paths start at the working directory {Path.cwd()}), or check the Hub name's "
                "spelling and the network"
            )
        raise UserError(f"{key}: {path}: {message}") from None


def start_folder(config: Config) -> Path:
    """Where the tokenizer and configuration of a model with random weights lie."""
    return config.run_dir / "start"


def resolved(config: Config, models: Mapping[str, Path]) -> Config:
    """The configuration with every `stage:NAME` replaced by that stage's model, and `model.new` by its start folder."""

    def path(given: str) -> str:
        return str(models[given.removeprefix(STAGE_PREFIX)]) if given.startswith(STAGE_PREFIX) else given

    found = config.with_model_paths(path)
    if config.model.new is None:
        return found
    return found.model_copy(update={"model": config.model.model_copy(update={"path": str(start_folder(config))})})


def make_start(config: Config) -> None:
    """Write tokenizer and configuration of `model.new` into `start_folder`, unless they are there already.

    Raises:
        UserError: the architecture is not one, or does not fit `training.max_length`.
    """
    new = config.model.new
    assert new is not None
    folder = start_folder(config)
    origin = {"new": new.model_dump(mode="json"), "text": config.data.model_dump(mode="json")}
    record = folder / "made_from.json"
    if record.is_file() and json.loads(record.read_text()) == origin:
        return
    tokenizer = load_tokenizer(config, path=new.tokenizer, key="model.new.tokenizer") if new.tokenizer else None
    if tokenizer is None:
        rows = stream_rows(
            config.data.train, columns=config.data.columns, on_bad_row=config.data.on_bad_row, required=("text",)
        )
        tokenizer = train_tokenizer((row["text"] for _, row in rows), vocabulary_size=new.vocabulary_size)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = architecture(new, size=len(tokenizer), tokens=tokens)
    context = getattr(model, "max_position_embeddings", config.training.max_length)
    if config.training.max_length > context:
        raise UserError(
            f"training.max_length: {config.training.max_length} is over model.new.architecture's "
            f"max_position_embeddings {context}; lower it"
        )
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    (unfinished / record.name).write_text(json.dumps(origin))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def architecture(new: NewModelConfig, *, size: int, tokens: Mapping[str, int | None] | None = None) -> Any:
    """The transformers configuration, with a vocabulary of this size and the ids of its special tokens.

    Raises:
        UserError: transformers does not take it.
    """
    from transformers import AutoConfig

    special = dict(tokens or {})
    fields = {**new.architecture, "vocab_size": size, **special}
    kind = fields.pop("model_type", None)
    if kind is None:
        raise UserError("model.new.architecture: model_type is required, for instance llama")
    try:
        known = AutoConfig.for_model(kind).to_dict()
        if unknown := sorted(set(fields) - set(known) - set(special)):
            close = difflib.get_close_matches(unknown[0], known, n=1)
            raise UserError(
                f"model.new.architecture.{unknown[0]}: {kind} has no such field"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )
        return AutoConfig.for_model(kind, **fields)
    except UserError:
        raise
    except Exception as error:  # transformers raises several kinds here
        why = " ".join(str(error).split())[:300]
        raise UserError(f"model.new.architecture: transformers does not take it: {why}") from None
