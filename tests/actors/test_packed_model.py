"""One packed row gives each sample what the model gives it alone, whatever the model's attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from actors.packed_model import PackedLogProbs, PackedModel, load_language_model
from actors.packed_row import PackedRow
from actors.ragged_attention import ragged_sdpa
from engine.config import Config, UserError
from tests.cluster.conftest import random_batch

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def configure(path, temperature: float = 1.0) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(path)},
            "data": {"train": "t.jsonl"},
            "rewards": {"functions": ["a.py:f"]},
            "rl": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
            "rollout": {"temperature": temperature},
        }
    )


def one_by_one(model, batch, temperature: float) -> torch.Tensor:
    parts, start = [], 0
    for length in batch.seq_lens:
        ids = torch.from_numpy(batch.tokens[start : start + length]).long()
        mask = torch.from_numpy(batch.loss_mask[start : start + length])[1:]
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None]).logits[0, :-1] / temperature, -1)
        parts.append(logp.gather(1, ids[1:, None])[:, 0][mask])
        start += length
    return torch.cat(parts)


def packed(path, batch, temperature: float) -> torch.Tensor:
    module = PackedLogProbs(
        PackedModel(load_language_model(configure(path, temperature))), temperature=temperature
    ).train()
    with torch.no_grad():
        return module(PackedRow.of(batch, torch.device("cpu")))[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_packed_row_equals_the_samples_one_by_one(tiny_model, temperature):
    batch = random_batch(9)
    alone = one_by_one(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), batch, temperature)
    torch.testing.assert_close(packed(tiny_model, batch, temperature), alone, atol=2e-5, rtol=0)


def test_sliding_windows_are_kept_and_attention_dropout_is_off_in_training(tmp_path):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8, attention_dropout=0.5)).eval()
    model.save_pretrained(tmp_path)
    batch = random_batch(9)
    alone = one_by_one(model, batch, 1.0)
    torch.testing.assert_close(packed(tmp_path, batch, 1.0), alone, atol=2e-5, rtol=0)
    wide = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)).eval()
    wide.load_state_dict(model.state_dict())
    assert (one_by_one(wide, batch, 1.0) - alone).abs().max() > 1e-3, "the window matters for these samples"


def test_attention_that_the_kernel_does_not_compute_is_refused():
    q = torch.zeros(1, 2, 3, 8)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(UserError, match="needs flash attention"):
        ragged_sdpa(torch.nn.Identity(), q, q, q, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends, s_aux=torch.zeros(2))


def test_a_model_that_changes_its_logits_after_the_projection_is_refused(tmp_path, tiny_model):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=32, final_logit_softcapping=30.0)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="final_logit_softcapping"):
        load_language_model(configure(tmp_path))


def test_an_empty_micro_batch_is_one_token_without_a_target():
    row = PackedRow.of(random_batch(3).select([]), torch.device("cpu"))
    assert (row.tokens.shape, row.targets.shape) == ((1, 1), (0,))


def test_the_first_token_of_a_sample_cannot_be_trained():
    batch = random_batch(2)
    batch.loss_mask[0] = True
    with pytest.raises(AssertionError, match="has no predictor"):
        PackedRow.of(batch, torch.device("cpu"))
