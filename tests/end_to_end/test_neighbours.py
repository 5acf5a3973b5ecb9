"""What one client does must not delay or change another: slow readers, equal beginnings."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing

from petal.client.session.result import OutputOptions

from ..support.swarms import local_swarm, spans
from ..support.tiny import VOCAB, tiny_llama


async def test_a_slow_reader_delays_nobody() -> None:
    """One client asks for megabytes of logits and reads none of them; another goes on at its own pace."""
    async with local_swarm(tiny_llama(), spans(4, 2)) as swarm, swarm.connect() as slow, swarm.connect() as quick:
        undisturbed = await quick.generate([5, 6, 7], max_new_tokens=40, eos_token_id=-1)
        with closing(await slow.open_session(500)) as session:
            # Nobody takes the answers from the stream any more.
            session._pipeline.hops[-1]._call.read = asyncio.Event().wait
            for start in range(0, 400, 100):
                ids = [(start + i) % VOCAB for i in range(100)]
                await session._send(
                    ids, (), OutputOptions(logits=True, top_logprobs=64), prefill=True, sample=False, sampling=None
                )
                session.ids.extend(ids)
            started = time.perf_counter()
            assert await quick.generate([5, 6, 7], max_new_tokens=40, eos_token_id=-1) == undisturbed
            assert time.perf_counter() - started < 10


async def test_equal_beginnings_are_computed_and_stored_once() -> None:
    """Prompts of one call that begin alike share the pages of what they share."""
    beginning = [(7 * i) % VOCAB for i in range(160)]
    prompts = [[*beginning, 3, i] for i in range(4)]
    async with local_swarm(tiny_llama(), spans(4, 1)) as swarm, swarm.connect() as client:
        apart = [
            await client.generate(prompt, max_new_tokens=20, eos_token_id=-1, drafter="none") for prompt in prompts
        ]
        pool = swarm.peers[0].engine.cache
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, pool.n_pages - pool.free_pages)
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        together = await client.generate(prompts, max_new_tokens=20, eos_token_id=-1, drafter="none")
        watching.cancel()
    assert together == apart
    # Ten pages are shared; each prompt has at most two of its own. Apart they would take 48.
    assert 10 < most <= 10 + 4 * 2 + 2
