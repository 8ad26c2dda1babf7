"""Runs one engine for test_lora_engine.py: loads each adapter of a list in turn and samples under it.

python lora_engine_process.py JOB: the job file holds the model, the prompts and the adapters' folders; what came out
is written beside it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

from actors.rollout import engine_environment

os.environ |= engine_environment("cpu", threads=1)

import torch
import vllm._custom_ops as ops
from safetensors.torch import load_file
from vllm import SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from actors.lora_engine import load_adapter


def sample(engine: LLMEngine, prompts: list[list[int]], lora: Any) -> list[dict[str, Any]]:
    """Token ids and log-probs of one response to each prompt."""
    settings = SamplingParams(max_tokens=12, temperature=1.0, logprobs=0, ignore_eos=True, seed=7)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, settings, lora_request=lora)
    responses: dict[int, dict[str, Any]] = {}
    while engine.has_unfinished_requests():
        for done in (output for output in engine.step() if output.finished):
            [response] = done.outputs
            ids = list(response.token_ids)
            steps = zip(ids, response.logprobs, strict=True)
            responses[int(done.request_id.split("-")[0])] = {"ids": ids, "logp": [s[t].logprob for t, s in steps]}
    return [responses[index] for index in range(len(prompts))]


def main(job_file: Path) -> None:
    """Do the job."""
    job = json.loads(job_file.read_text())
    ops._supports_onednn = False
    engine = LLMEngine.from_engine_args(EngineArgs(**job["engine"]), enable_multiprocessing=False)
    results: list[dict[str, Any]] = []
    lora = None
    for version, folder in enumerate(job["adapters"], 1):
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        error = None
        try:
            lora = load_adapter(engine, tensors, config, version=version)
        except (ValueError, RuntimeError) as caught:
            error = str(caught)
        results.append(
            {
                "error": error,
                "untouched": all(torch.equal(before[name], tensors[name]) for name in before),
                "responses": sample(engine, job["prompts"], lora),
            }
        )
    base = sample(engine, job["prompts"], None)
    report = {"results": results, "base": base, "ranks": get_args(MaxLoRARanks)}
    job_file.with_suffix(".out").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
