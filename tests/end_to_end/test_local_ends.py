"""A client that holds embedding and LM head: the same tokens to the bit, and no token id on the wire."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from petal.client.routing.route import NoRoute
from petal.client.session.local_ends import LocalEnds, LocalEndsError
from petal.client.session.peer_error import PeerError
from petal.client.session.result import OutputOptions
from petal.client.swarm import AsyncSwarmModel, ConnectError
from petal.peer.engine.step import StepOutput
from petal.peer.model import load_ends
from petal.peer.session.outputs import result_frames
from petal.peer.session.session import PeerSession
from petal.protocol import petal_pb2 as pb
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.wire.sampling import SamplingError, SamplingParams
from petal.protocol.wire.step import StepHeader
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LogitsProcessor,
    PretrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from ..support.random_drafter import RandomDrafter
from ..support.sampling import SAMPLING
from ..support.swarms import LocalSwarm, local_swarm, spans
from ..support.tiny import VOCAB, tiny_llama
from ..support.trees import token_chain

PROMPT = [5, 17, 90, 33, 2, 8]
COMMON = {"max_new_tokens": 40, "eos_token_id": -1}
SAMPLED = {**COMMON, "temperature": 0.8, "top_p": 0.95, "seed": 3}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Exact peers give torch a single thread, and these live in our process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@asynccontextmanager
async def both(swarm: LocalSwarm, **options: object) -> AsyncIterator[tuple[AsyncSwarmModel, AsyncSwarmModel]]:
    """A client whose last stage samples, and one with local ends."""
    async with swarm.connect(**options) as plain, swarm.connect(local_ends=True, **options) as local:
        yield plain, local


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[pb.Step]:
    """All steps that clients send to peers of this process."""
    steps: list[pb.Step] = []
    on_step = PeerSession.on_step

    def note(session: PeerSession, message: pb.Step, size: int) -> None:
        steps.append(message)
        on_step(session, message, size)

    monkeypatch.setattr(PeerSession, "on_step", note)
    return steps


def tells_ids(step: pb.Step) -> bool:
    return bool(step.ids or step.HasField("history") or step.HasField("sampling") or step.sample)


@pytest.mark.parametrize(("peers", "dtype"), [(1, "float32"), (2, "bf16"), (3, "float32")])
async def test_the_same_tokens_and_bits_and_no_ids_on_the_wire(sent: list[pb.Step], peers: int, dtype: str) -> None:
    trips = 0
    async with (
        local_swarm(tiny_llama(), spans(4, peers), exact=True, dtype=dtype) as swarm,
        both(swarm, exact=True) as (plain, local),
    ):
        answers = []
        for settings in SAMPLING:
            asked = {**COMMON, "seed": 3, "top_logprobs": 2, **settings}
            expected = [piece async for piece in plain.stream(PROMPT, drafter="none", **asked)]
            ids = [token for piece in expected for token in piece.ids]
            assert tells_ids(sent[-1]), "the check must be able to fail"
            sent.clear()
            drafter = RandomDrafter.knowing([*PROMPT, *ids], VOCAB, 1)
            pieces = [piece async for piece in local.stream(PROMPT, drafter=drafter, budget=12, **asked)]
            assert [token for piece in pieces for token in piece.ids] == ids
            assert [row for piece in pieces for row in piece.logprobs] == [p for e in expected for p in e.logprobs]
            assert sent
            assert not any(map(tells_ids, sent))
            trips += len(pieces)
            answers.append(ids)
        assert len({tuple(ids) for ids in answers}) == len(SAMPLING)
        assert trips < 0.9 * 40 * len(SAMPLING), "the random trees were never accepted: the test shows nothing"
        with closing(await local.open_session(128)) as session:
            told = await session.prefill(PROMPT * 4, output=OutputOptions(logits=True, hidden=True), chunk=7)
            ours = session.options.local_ends._ends.logits(torch.from_numpy(told.hidden)).numpy()
            assert np.array_equal(ours, told.logits)


async def test_fast_mode_small_codecs_forks_and_rewinds() -> None:
    async with local_swarm(tiny_llama(), spans(4, 2)) as swarm:
        for codec in ("bf16", "int8"):
            async with both(swarm, codec=codec) as (plain, local):
                lengths = {len(await client.generate(PROMPT, **SAMPLED)) for client in (plain, local)}
                assert lengths == {len(PROMPT) + 40}
        async with both(swarm) as (plain, local):
            several = {**SAMPLED, "num_return_sequences": 3, "repetition_penalty": 1.2}
            answers = await local.generate(PROMPT, **several)
            assert answers == await plain.generate(PROMPT, **several)
            assert len(set(map(tuple, answers))) == 3
            with closing(await local.open_session(128)) as session:
                params = SamplingParams(temperature=0.9, presence_penalty=0.5, seed=1)
                first = await session.prefill(PROMPT, params)
                step = await session.step(token_chain([first.next_token]))
                session.rewind(len(PROMPT))
                again = await session.step(token_chain([first.next_token]))
                assert step.next_token == again.next_token
                assert step.hidden.shape == (1, 64)


async def test_peers_fail(sent: list[pb.Step]) -> None:
    """Whoever takes over gets embeddings again, and the tokens go on."""
    parts = [range(0, 1), range(1, 3), range(3, 4)]
    async with (
        local_swarm(tiny_llama(), [*parts, *parts], exact=True, replay_bytes=0) as swarm,
        both(swarm, exact=True) as (plain, local),
    ):
        expected = await plain.generate(PROMPT, **SAMPLED)
        for place in range(3):
            sent.clear()
            said = list(PROMPT)
            async with await local.open_session(128) as session:
                result = await session.prefill(PROMPT, SamplingParams(temperature=0.8, top_p=0.95, seed=3))
                said.append(result.next_token)
                while len(said) < len(expected):
                    if len(said) == len(PROMPT) + 8:
                        [lost] = [p for p in swarm.peers if p.identity.peer_id == session.route[place].peer.peer_id]
                        await lost._grpc.stop(None)
                    result = await session.step(token_chain(said[-1:]))
                    said += [*result.path_ids, result.next_token]
                assert len(session.take_events()) == 1
            assert said == expected
            assert any(step.replay and step.embeddings for step in sent)
            assert not any(map(tells_ids, sent))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hidden: hidden[:-1], "63 bytes are no rows of 64|255 bytes are no rows of 256"),
        (lambda hidden: b"\xff" * len(hidden), "not finite"),
        (lambda hidden: hidden * 2, "hidden states of 2 rows, not 1"),
        (lambda hidden: b"", "hidden states of 0 rows, not 1"),
    ],
    ids=["cut", "NaN", "more", "none"],
)
async def test_a_tail_that_sends_no_hidden_states(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes], reason: str
) -> None:
    def altered(header: StepHeader, output: StepOutput, hops: Iterable[pb.Hop]) -> list[pb.PeerFrame]:
        return result_frames(header, replace(output, hidden=change(output.hidden)), hops)

    async with local_swarm(tiny_llama(), spans(4, 1)) as swarm, swarm.connect(local_ends=True) as client:
        client.connection.defaults = replace(client.connection.defaults, wait_s=0.0)
        async with await client.open_session(64) as session:
            result = await session.prefill(PROMPT, SamplingParams())
            monkeypatch.setattr("petal.peer.session.outputs.result_frames", altered)
            with pytest.raises((PeerError, NoRoute)):
                await session.step(token_chain([result.next_token]))
            assert re.search(reason, str(session._pipeline.hops[-1].failed))


class _Forbid(LogitsProcessor):
    """Every token there is."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)


async def test_logits_processors() -> None:
    async with local_swarm(tiny_llama(), spans(4, 2)) as swarm, both(swarm) as (plain, local):
        for settings, drafted in itertools.product((COMMON, SAMPLED), (False, True)):
            expected = await plain.generate(PROMPT, repetition_penalty=1.5, **settings)
            assert expected != await plain.generate(PROMPT, **settings)
            drafter = RandomDrafter.knowing(expected, VOCAB, 2) if drafted else "none"
            penalty = RepetitionPenaltyLogitsProcessor(1.5)
            asked = {"logits_processor": [penalty], "drafter": drafter, "budget": 8, **settings}
            assert await local.generate(PROMPT, **asked) == expected
        odd = SuppressTokensLogitsProcessor(range(1, VOCAB, 2))
        answer = await local.generate(PROMPT, logits_processor=[odd], **SAMPLED)
        assert not any(token % 2 for token in answer[len(PROMPT) :])
        with pytest.raises(SamplingError, match="leave at least one token"):
            await local.generate(PROMPT, logits_processor=[_Forbid()], **SAMPLED)
        with pytest.raises(ValueError, match=r"scores of shape \[1, 3\], not \[1, 256\]"):
            await local.generate(PROMPT, logits_processor=[lambda ids, scores: scores[:, :3]], **SAMPLED)
        with pytest.raises(ValueError, match="connect with local_ends=True"):
            await plain.generate(PROMPT, logits_processor=[odd], **SAMPLED)


FAMILIES = [
    GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2),
    Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    ),
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_ends_of_families_with_something_beside_the_embedding(config: PretrainedConfig, tmp_path: Path) -> None:
    """Learned positions, a norm behind the embedding, scaled rows and capped logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    ends = load_ends(open_checkpoint(tmp_path))
    ids, last = torch.randint(VOCAB, (12,)), []
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    blocks[-1].register_forward_hook(lambda m, inputs, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.inference_mode():
        said = model(ids[None], output_hidden_states=True)
        assert torch.equal(ends.embed(ids, torch.arange(12)), said.hidden_states[0][0])
        torch.testing.assert_close(ends.logits(last[0].view(12, 64)), said.logits[0], atol=1e-5, rtol=0)
        # Two rows of a tree at one position, as at any other place.
        siblings = ends.embed(ids[[3, 4, 4]], torch.tensor([3, 4, 4]))
        assert torch.equal(siblings, said.hidden_states[0][0][[3, 4, 4]])


async def test_other_weights_than_the_peers_are_noticed(tmp_path: Path) -> None:
    """The same config and names, another training: the model's digest cannot tell."""
    other = shutil.copytree(tiny_llama(1), tmp_path / tiny_llama(0).name)
    async with local_swarm(tiny_llama(0), spans(4, 1)) as swarm:
        with pytest.raises(ConnectError, match=rf"the head of {other.name} here differs from that of the peers"):
            await AsyncSwarmModel.connect(str(other), [swarm.address], wait_s=20, local_ends=True)


def test_arithmetics_that_cannot_agree() -> None:
    with pytest.raises(LocalEndsError, match=r"peers compute in int4; local ends do in float32 or bf16"):
        LocalEnds.load(str(tiny_llama()), pb.PeerRecord(dtype="int4"), exact=False)
    with pytest.raises(LocalEndsError, match=r"here it is float32/\w+, on peers float32/other"):
        LocalEnds.load(str(tiny_llama()), pb.PeerRecord(dtype="float32", numerics="float32/other"), exact=True)
    with pytest.raises(LocalEndsError, match="no local ends in /nowhere"):
        LocalEnds.load("/nowhere", pb.PeerRecord(dtype="float32"), exact=False)
