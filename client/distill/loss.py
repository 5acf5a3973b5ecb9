"""How far the drafter's distribution is from the target's."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(student: Tensor, target: Tensor, tv_weight: float) -> Tensor:
    """Sum over rows of KL(target, student) + tv_weight x total variation, from logits [n, vocab].

    The share of drafts that shared noise accepts falls with total variation; KL alone also moves what is far off.
    """
    log_q = torch.log_softmax(student.float(), 1)
    log_p = torch.log_softmax(target.float(), 1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum()
    return kl + tv_weight * 0.5 * (p - log_q.exp()).abs().sum()


@torch.no_grad()
def completed(top_ids: Tensor, top_logprobs: Tensor, student: Tensor) -> Tensor:
    """The target's log-probabilities [n, vocab] where only its likeliest [n, k] are known.

    The rest is spread as the student has it, so that the divergence is that over the k tokens and one bucket of others.
    """
    log_q = torch.log_softmax(student.float(), 1)
    others = log_q.scatter(1, top_ids.long(), -torch.inf)
    rest = torch.log1p(-top_logprobs.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
    spread = others - others.logsumexp(1, keepdim=True) + rest
    return spread.scatter(1, top_ids.long(), top_logprobs)


@torch.no_grad()
def agreement(student: Tensor, target: Tensor) -> Tensor:
    """Sums over rows of logits [n, vocab] -> [4]: target's likeliest in the student's top 1, 4, 8; total variation."""
    best = target.argmax(1)
    rank = (student > student.gather(1, best[:, None])).sum(1)
    tv = 0.5 * (student.float().softmax(1) - target.float().softmax(1)).abs().sum(1)
    return torch.stack([(rank < 1).sum(), (rank < 4).sum(), (rank < 8).sum(), tv.sum()])
