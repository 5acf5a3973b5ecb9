"""Dialogues that the target writes by itself, both sides, many rows in lockstep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...protocol.wire.sampling import SamplingParams, TokenCounts
from ...protocol.wire.sampling import draw as draw_as_tail
from .device import compiled
from .target import LocalTarget
from .texts import Texts
from .turns import USER, TurnKeeper, Turns

# What turns are drawn at, by speaker: users vary, answers are half greedy, as drafts serve both.
TEMPERATURES = ((1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.9, 0.8), (0.0, 0.0, 0.0, 0.3, 0.7, 1.0, 1.0, 1.0))
# A user's first word decides most of what follows, and models have few favourites.
FIRST_WORD = 1.5


def draw(logits: Tensor, temperature: Tensor) -> Tensor:
    """One token a row: [rows, vocab], [rows] -> [rows]; at temperature 0 the likeliest."""
    noise = -torch.log(torch.empty_like(logits, dtype=torch.float32).exponential_())
    return (logits.float() + temperature[:, None] * noise).argmax(1)


@torch.no_grad()
def sample(target: LocalTarget, turns: Turns, rows: int, length: int, seed: int) -> Texts:
    """`rows` dialogues of `length` tokens; the same for the same seed on the same device."""
    device = target.device
    torch.manual_seed(seed)
    pick = compiled(draw, device)
    keeper = TurnKeeper(turns, rows, target.vocab, device)
    temperature = _fresh(keeper.speaker)
    ids = torch.zeros(rows, length, dtype=torch.int32, device=device)
    own = torch.zeros(rows, length, dtype=torch.bool, device=device)
    token = torch.full((rows,), turns.opening[0], device=device)
    keeper.advance(token)
    with target.lockstep(length) as cache:
        for at in range(length):
            ids[:, at] = token
            if at + 1 < length:
                heat = torch.where(keeper.begins & (keeper.speaker == USER), FIRST_WORD, temperature)
                token, own[:, at + 1], ended = keeper.advance(pick(target.step(token, cache), heat))
                temperature = torch.where(ended, _fresh(keeper.speaker), temperature)
    return Texts(ids.cpu(), own.cpu())


def _fresh(speaker: Tensor) -> Tensor:
    table = torch.tensor(TEMPERATURES, device=speaker.device)
    return table[speaker, torch.randint(table.shape[1], speaker.shape, device=speaker.device)]


@torch.no_grad()
def answers(
    target: LocalTarget, prompts: Sequence[Sequence[int]], tokens: int, params: SamplingParams
) -> list[list[int]]:
    """`tokens` tokens behind each prompt, as a last stage draws them."""
    rows = [list(prompt) for prompt in prompts]
    with target.lockstep(max(map(len, rows)) + tokens) as cache:
        while any(len(row) < len(prompt) + tokens for row, prompt in zip(rows, prompts, strict=True)):
            fed = [row[cache.length] for row in rows]
            logits = target.step(torch.tensor(fed, device=target.device), cache).float().cpu().numpy()
            for row, values in zip(rows, logits, strict=True):
                if len(row) == cache.length:
                    row.append(draw_as_tail(values, params, cache.length, TokenCounts()))
    return [row[len(prompt) : len(prompt) + tokens] for row, prompt in zip(rows, prompts, strict=True)]
