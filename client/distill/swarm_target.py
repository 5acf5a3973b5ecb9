"""A target that only a swarm holds: it is asked for dialogues, and for its likeliest tokens wherever it speaks."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...protocol.wire.limits import TOP_LOGPROBS
from ...protocol.wire.sampling import SamplingParams
from ..swarm import AsyncSwarmModel
from .dialogues import TEMPERATURES
from .loss import completed
from .texts import Texts
from .turns import ASSISTANT, USER, Turns

# Dialogues under way at a time: peers batch them, and a long route is idle most of the time of each.
_AT_ONCE = 16
# For blocks that nobody hosts at the moment.
_WAIT_S = 30.0


@dataclass
class _Row:
    """One dialogue so far; `top` has one entry a token, empty where it is not the target's own."""

    ids: list[int] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    def add(self, ids: Sequence[int], top: Sequence[list[tuple[int, float]]] = ()) -> None:
        self.ids += ids
        self.top += list(top) or [[] for _ in ids]


class SwarmTarget:
    """The model behind `peers`, for training on `device`."""

    def __init__(self, model: str, peers: Sequence[str], device: torch.device) -> None:
        self.device = device
        self._model, self._peers = model, list(peers)

    def lessons(self, texts: Texts, rows: Tensor, chunk: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """See train.Target: what the swarm said is completed by what the drafter itself believes of the rest."""
        assert texts.top_ids is not None
        assert texts.top_logprobs is not None
        ids, logprobs = (x[:, 1:].flatten(0, 1)[rows] for x in (texts.top_ids, texts.top_logprobs))
        for part in zip(ids.split(chunk), logprobs.split(chunk), strict=True):
            yield functools.partial(completed, *part)

    def sample(self, turns: Turns, rows: int, length: int, seed: int) -> Texts:
        """`rows` dialogues of one question and one answer, cut or padded to `length` tokens. Raises PeerError."""

        async def work(swarm: AsyncSwarmModel) -> list[_Row]:
            slots = asyncio.Semaphore(_AT_ONCE)

            async def one(row: int) -> _Row:
                async with slots:
                    return await _dialogue(swarm, turns, length, random.Random(f"{seed}/{row}"))

            return await asyncio.gather(*(one(row) for row in range(rows)))

        return _texts(self._run(work), length)

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int, params: SamplingParams) -> list[list[int]]:
        """`tokens` tokens behind each prompt."""
        settings: dict[str, Any] = {"max_new_tokens": tokens, "temperature": params.temperature, "seed": params.seed}

        async def work(swarm: AsyncSwarmModel) -> list[list[int]]:
            found = (swarm.generate(list(prompt), eos_token_id=-1, **settings) for prompt in prompts)
            return [ids[len(prompt) :] for ids, prompt in zip(await asyncio.gather(*found), prompts, strict=True)]

        return self._run(work)

    def _run(self, work: Callable[[AsyncSwarmModel], Coroutine[Any, Any, Any]]) -> Any:
        async def connected() -> Any:
            swarm = await AsyncSwarmModel.connect(self._model, self._peers, wait_s=_WAIT_S)
            try:
                return await work(swarm)
            finally:
                await swarm.close()

        return asyncio.run(connected())


async def _dialogue(swarm: AsyncSwarmModel, turns: Turns, length: int, chance: random.Random) -> _Row:
    row = _Row()
    row.add(turns.opening)
    for speaker, frame in ((USER, turns.to_assistant), (ASSISTANT, turns.to_user)):
        room = length - len(row.ids)
        if room < 1:
            break
        own = speaker == ASSISTANT
        chunks = swarm.stream(
            list(row.ids),
            max_new_tokens=room,
            temperature=chance.choice(TEMPERATURES[speaker]),
            seed=chance.getrandbits(63),
            top_logprobs=TOP_LOGPROBS if own else 0,
        )
        async for chunk in chunks:
            top = [[(entry.id, entry.logprob) for entry in said.top] for said in chunk.logprobs]
            row.add(chunk.ids, top if own else ())
        # The frame begins with what ended the turn.
        if row.ids[-1] in turns.end_ids:
            row.add(frame[1:] if frame[0] in turns.end_ids else frame)
    return row


def _texts(rows: Sequence[_Row], length: int) -> Texts:
    ids = torch.zeros(len(rows), length, dtype=torch.int32)
    own = torch.zeros(len(rows), length, dtype=torch.bool)
    top_ids = torch.zeros(len(rows), length, TOP_LOGPROBS, dtype=torch.int32)
    top_logprobs = torch.full((len(rows), length, TOP_LOGPROBS), -torch.inf)
    for i, row in enumerate(rows):
        said = row.ids[:length]
        ids[i, : len(said)] = torch.tensor(said, dtype=torch.int32)
        for at, top in enumerate(row.top[:length]):
            if top:
                own[i, at] = True
                top_ids[i, at, : len(top)] = torch.tensor([id for id, _ in top], dtype=torch.int32)
                top_logprobs[i, at, : len(top)] = torch.tensor([logprob for _, logprob in top])
    return Texts(ids, own, top_ids, top_logprobs)
