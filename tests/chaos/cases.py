"""The pool of prompts and samplings, and what an undisturbed peer answers."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.swarms import local_swarm
from tests.support.tiny import VOCAB, tiny_llama

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.1},
]
PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Case:
    """A prompt and how to sample; `answer` is what an undisturbed run gives."""

    prompt: tuple[int, ...]
    settings: dict[str, Any]
    answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model:
    """What the swarm serves, and how it is cut."""

    name: str
    n_blocks: int
    vocab: int
    prompts: tuple[tuple[int, ...], ...]


def tiny() -> Model:
    """Random weights; prompts of one chunk and of several."""
    rng = random.Random(0)
    prompts = tuple(tuple(rng.choices(range(VOCAB), k=length)) for length in (3, 20, 70, 150, 260, 8, 40, 110))
    return Model(str(tiny_llama()), 4, VOCAB, prompts)


def demo() -> Model:
    """SmolLM2-135M-Instruct on the prompts of the benchmarks."""
    from tests.support.reference import demo_checkpoint

    tokenizer = demo_checkpoint().tokenizer()
    texts = [json.loads(line)["text"] for line in PROMPTS.read_text().splitlines()]
    prompts = (tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}])) for text in texts)
    return Model("demo", demo_checkpoint().n_blocks, tokenizer.vocab_size, tuple(prompts))


MODELS = {"tiny": tiny, "demo": demo}


async def answered_cases(model: Model, tokens: int) -> list[Case]:
    """Each prompt with a sampling of its own, answered by one exact peer in this process, where nothing happens."""
    settings = [
        {**SAMPLING[i % len(SAMPLING)], "seed": i, "max_new_tokens": tokens, "eos_token_id": -1}
        for i in range(len(model.prompts))
    ]
    async with (
        local_swarm(model.name, [range(model.n_blocks)], exact=True) as swarm,
        swarm.connect(exact=True) as client,
    ):
        work = (client.generate(list(p), drafter="none", **s) for p, s in zip(model.prompts, settings, strict=True))
        answers = await asyncio.gather(*work)
    return [
        Case(prompt, setting, tuple(answer[len(prompt) :]))
        for prompt, setting, answer in zip(model.prompts, settings, answers, strict=True)
    ]
