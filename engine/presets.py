"""Algorithms of online training as values of the same knobs: `algorithm: gspo` in the YAML takes these.

Keys are fields of `AlgorithmConfig`; what a preset leaves out keeps its default, and what the YAML gives wins over
both. docs/algorithms has a page for each, with its formula, its paper and what was left out.
"""

from __future__ import annotations

from typing import Any

_UNCORRECTED = {"correction": {"mode": "none"}}
"""Answers that were chosen are not weighted by how likely they were."""

PRESETS: dict[str, dict[str, Any]] = {
    "ppo": {  # arXiv:1707.06347, 2203.02155
        "advantage": "gae",
        "lam": 0.95,
        "whiten_advantages": True,
        "loss_aggregation": "token-mean",
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "grpo": {},  # arXiv:2402.03300
    "dr_grpo": {  # arXiv:2503.20783
        "advantage_scale": "none",
        "loss_aggregation": "seq-mean-token-sum-norm",
    },
    "rloo": {  # arXiv:2402.14740
        "advantage": "leave_one_out",
        "loss_aggregation": "seq-mean-token-sum",
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "reinforce_pp": {  # arXiv:2501.03262
        "advantage": "returns",
        "whiten_advantages": True,
        "loss_aggregation": "token-mean",
        "kl_coef": 0.01,
        "kl_estimator": "k1",
        "kl_in": "reward",
    },
    "reinforce_pp_baseline": {  # arXiv:2501.03262, with the group's mean as the baseline
        "advantage_scale": "none",
        "whiten_advantages": True,
        "loss_aggregation": "token-mean",
        "kl_coef": 0.01,
        "kl_estimator": "k2",
    },
    "dapo": {  # arXiv:2503.14476
        "loss_aggregation": "token-mean",
        "clip_high": 0.28,
        "dynamic_sampling_rounds": 10,
        "overlong_penalty": 1.0,
    },
    "gspo": {  # arXiv:2507.18071
        "loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
    },
    "cispo": {  # arXiv:2506.13585
        "loss": "cispo",
        "loss_aggregation": "token-mean",
        "clip_low": 1.0,
        "clip_high": 0.28,
    },
    "online_dpo": {  # arXiv:2402.04792
        "advantage": "best_vs_worst",
        "loss": "preference",
        **_UNCORRECTED,
    },
    "iterative_dpo": {  # arXiv:2312.16682, 2404.19733
        "advantage": "best_vs_worst",
        "loss": "preference",
        "reference": "step",
        **_UNCORRECTED,
    },
    "rejection_sampling": {  # arXiv:2304.06767
        "advantage": "best_of_n",
        "loss": "reinforce",
        "loss_aggregation": "token-mean",
        **_UNCORRECTED,
    },
}
