"""An algorithm of one's own: advantages against the group's median, and a loss that fades out instead of clipping."""

import torch


def median_baseline(scores_B: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """[B] score minus the median score of the sample's group."""
    advantages_B = torch.zeros_like(scores_B)
    for group in group_ids.unique():
        members = group_ids == group
        advantages_B[members] = scores_B[members] - scores_B[members].quantile(0.5)
    return advantages_B


def soft_clip(logp_T, old_logp_T, advantages_T, seq_lens):
    """[T] 4 sigmoid(ratio - 1) in place of the ratio: the gradient is whole at ratio 1 and fades away from it."""
    ratio_T = (logp_T - old_logp_T).clamp(-20, 20).exp()
    return -4 * torch.sigmoid(ratio_T - 1) * advantages_T
