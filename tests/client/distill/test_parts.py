"""The pieces of `petal distill`, each against an independent answer."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from petal.client.distill.corpus import Corpus
from petal.client.distill.device import scale_for
from petal.client.distill.dialogues import answers, draw, sample
from petal.client.distill.gguf_writer import write_gguf
from petal.client.distill.loss import agreement, completed, divergence
from petal.client.distill.rounds import tokens_a_round
from petal.client.distill.shape import DistillError, parameters_of, shape_for
from petal.client.distill.student import leading
from petal.client.distill.swarm_target import SwarmTarget
from petal.client.distill.target import LocalTarget
from petal.client.distill.texts import Texts
from petal.client.distill.turns import ASSISTANT, TurnKeeper, turns_of
from petal.client.distill.world import World, together
from petal.client.drafting.registry import load_drafter, shipped_drafter
from petal.peer.model import read_dense
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.wire.sampling import SamplingParams
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ...support.swarms import local_swarm
from .target_files import VOCAB, write_target

CPU_DEVICE = torch.device("cpu")
USER_ID, ASSISTANT_ID, END_ID = 1, 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def turns(folder):
    with open_checkpoint(folder) as checkpoint:
        return turns_of(checkpoint.tokenizer(), "tiny")


@pytest.fixture(scope="module")
def target(folder):
    with open_checkpoint(folder) as checkpoint:
        return LocalTarget(checkpoint, CPU_DEVICE)


# Shapes and memory.


@settings(deadline=None, max_examples=50)
@given(st.integers(10**6, 10**9), st.integers(2, 20_000))
def test_a_shape_never_exceeds_its_size(parameters, vocab):
    shape = shape_for(parameters, vocab)
    assert 0.7 * parameters < shape.parameters <= parameters
    assert shape.hidden % 32 == shape.ffn % 32 == shape.heads % shape.kv_heads == 0


def test_the_demo_drafter_fits_17_mb_and_is_found():
    assert shape_for(16_000_000, 49152).parameters / 32 * 34 <= 17_000_000
    with open_checkpoint("demo") as demo:
        found = shipped_drafter(bytes.fromhex(demo.digest()))
        assert found is not None
        assert found.stat().st_size <= 17_000_000
        with open_checkpoint(found) as drafter:
            assert drafter.vocab_digest() == demo.tokenizer().vocab_digest
    assert shipped_drafter(bytes(32)) is None  # negative control


def test_a_shape_counts_what_transformers_builds():
    shape = shape_for(60_000, VOCAB)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers, head_dim=shape.head_dim,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn,
        tie_word_embeddings=True,
    )  # fmt: skip
    assert sum(p.numel() for p in LlamaForCausalLM(config).parameters()) == shape.parameters


@pytest.mark.parametrize(("text", "value"), [("16M", 16_000_000), ("1.5b", 1_500_000_000), ("800k", 800_000)])
def test_sizes(text, value):
    assert parameters_of(text) == value


def test_the_size_that_is_said_to_fit_fits():
    shape, free = shape_for(10**9, 50_000), 10**10
    with pytest.raises(DistillError, match="fits") as refused:
        scale_for("cuda", shape, 10**8, 1000, free)
    said = str(refused.value).rpartition("--size ")[2].removesuffix(" fits.")
    assert scale_for("cuda", shape_for(parameters_of(said), 50_000), 10**8, 1000, free).sampled >= 1
    with pytest.raises(DistillError, match="--initial-peers"):
        scale_for("cuda", shape, 10**11, 1000, free)


# Sampling.


def test_turns_are_read_off_the_template(turns):
    assert turns.opening == (USER_ID,)
    assert turns.to_assistant == (END_ID, ASSISTANT_ID)
    assert turns.to_user == (END_ID, USER_ID)


def test_a_template_that_hides_the_words_is_refused(tmp_path):
    folder = write_target(tmp_path, "{% for m in messages %}<user> {{ m.content | upper }} <end>{% endfor %}")
    with open_checkpoint(folder) as checkpoint, pytest.raises(DistillError, match="changes what is said"):
        turns_of(checkpoint.tokenizer(), "tiny")


def test_a_dialogue_follows_its_frame(turns):
    keeper = TurnKeeper(turns, 1, VOCAB, CPU_DEVICE)
    drawn = [9, 20, 21, END_ID, 9, 30, END_ID, 9, 40]
    said = [tuple(x.item() for x in keeper.advance(torch.tensor([token]))) for token in drawn]
    tokens, own, _ = zip(*said, strict=True)
    assert tokens == (USER_ID, 20, 21, END_ID, ASSISTANT_ID, 30, END_ID, USER_ID, 40)
    assert own == (False, False, False, False, False, True, True, False, False)


def test_sampled_rows_are_dialogues(target, turns):
    texts = sample(target, turns, 16, 96, seed=3)
    assert torch.equal(texts.ids, sample(target, turns, 16, 96, seed=3).ids)
    assert not torch.equal(texts.ids, sample(target, turns, 16, 96, seed=4).ids)
    assert texts.own.any()
    for ids, own in zip(texts.ids.tolist(), texts.own.tolist(), strict=True):
        speaker = None
        for at, token in enumerate(ids):
            # After <user> or <assistant> its words; <end> is the last of them.
            assert own[at] == (speaker == ASSISTANT)
            frame = speaker is None
            if frame and token in (USER_ID, ASSISTANT_ID):
                speaker = ASSISTANT if token == ASSISTANT_ID else 0
            elif token == END_ID:
                speaker = None


def test_lockstep_gives_the_logits_of_a_whole_pass(target, folder):
    ids = torch.randint(VOCAB, (3, 20))
    reference = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[:, -1]
    with target.lockstep(20) as cache:
        for column in ids.T:
            logits = target.step(column, cache)
    assert torch.allclose(logits, reference, atol=1e-4)
    with target.lockstep(20) as cache:
        for column in ids.flip(1).T:
            logits = target.step(column, cache)
    assert not torch.allclose(logits, reference, atol=1e-2)


def test_draws_follow_the_temperature():
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -1.0]]).repeat(60_000, 1)
    temperature = torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(20_000)
    for part, t in zip(draw(logits, temperature).split(20_000), (0.0, 0.5, 1.0), strict=True):
        expected = torch.softmax(logits[0] / t, 0) if t else torch.tensor([1.0, 0.0, 0.0])
        assert torch.allclose(torch.bincount(part, minlength=3) / 20_000, expected, atol=0.02)


def test_answers_are_transformers_own(target, folder):
    prompts = [[USER_ID, 9, 10], [USER_ID, 11]]
    model = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, said in zip(prompts, answers(target, prompts, 12, SamplingParams()), strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert said == expected[0, len(prompt) :].tolist()


# Learning.


def test_divergence_is_torchs():
    p, q = torch.randn(5, 30), torch.randn(5, 30)
    kl = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="sum")
    tv = 0.5 * (p.softmax(1) - q.softmax(1)).abs().sum()
    assert torch.allclose(divergence(q, p, 2.0), kl + 2 * tv, atol=1e-5)
    assert divergence(p, p, 1.0).abs() < 1e-5


def test_top_k_lessons_are_divergences_over_k_tokens_and_the_rest():
    q, p = torch.randn(4, 50), torch.randn(4, 50).log_softmax(1)
    top = p.topk(8)
    whole = completed(top.indices, top.values, q)
    assert torch.allclose(whole.exp().sum(1), torch.ones(4), atol=1e-5)
    rest_p, rest_q = 1 - top.values.exp().sum(1), 1 - q.softmax(1).gather(1, top.indices).sum(1)
    kl = (top.values.exp() * (top.values - q.log_softmax(1).gather(1, top.indices))).sum()
    kl += (rest_p * (rest_p / rest_q).log()).sum()
    assert torch.allclose(divergence(q, whole, 0.0), kl, atol=1e-4)


def test_agreement_counts_ranks():
    target = torch.eye(10)[[0, 0, 0]] * 5
    student = torch.zeros(3, 10)
    student[0, 0] = 1.0
    student[1, 1:4] = 1.0  # rank 3
    student[2, 1:] = 1.0  # rank 9
    assert agreement(student, target)[:3].tolist() == [1, 2, 2]


def test_the_embedding_keeps_dot_products():
    low = torch.randn(40, 8) @ torch.randn(8, 32)
    assert torch.allclose(leading(low, 8) @ leading(low, 8).T, low @ low.T, atol=1e-2)
    assert not torch.allclose(leading(low, 4) @ leading(low, 4).T, low @ low.T, atol=1e-2)


def test_a_corpus_drops_repeats_and_is_the_same_again():
    ids = torch.arange(60, dtype=torch.int32).view(20, 3)
    texts = Texts(torch.cat((ids, ids[:5])), torch.ones(25, 3, dtype=torch.bool))
    first, second = Corpus(texts, seed=1), Corpus(texts, seed=1)
    assert len(first) + len(first.held_out) == 20
    epoch = torch.cat([first.batch(step, 4).ids for step in range(4)])
    assert len(epoch.unique(dim=0)) == 16
    assert torch.equal(second.batch(3, 4).ids, epoch[12:])
    assert not torch.equal(torch.cat([first.batch(step, 4).ids for step in range(4, 8)]), epoch)
    assert not any((epoch == row).all(1).any() for row in first.held_out.ids)
    with pytest.raises(DistillError, match="give more"):
        Corpus(Texts(ids, torch.zeros(20, 3, dtype=torch.bool)), seed=1)


def test_a_perfect_drafter_brings_whole_trees(folder, target):
    """The target as its own drafter: at T = 0 every level is right, so a round brings as many tokens as levels."""
    with open_checkpoint(folder) as checkpoint:
        drafter = load_drafter(str(folder), checkpoint.tokenizer())
    prompts = [[USER_ID, 9, 10]]
    right = answers(target, prompts, 24, SamplingParams())
    wrong = [[(token + 1) % VOCAB for token in right[0]]]
    assert tokens_a_round(drafter, prompts, right, 8, SamplingParams()) > 1.5
    assert tokens_a_round(drafter, prompts, wrong, 8, SamplingParams()) < 1.5


# What is written.


def test_a_gguf_file_gives_the_model_back(folder, tmp_path):
    with open_checkpoint(folder) as checkpoint:
        config = {**checkpoint.config, "vocab_digest": "ab", "draft_vocabulary": [1, 5, 9]}
        tensors = {name: checkpoint.read_f32(name) for name in checkpoint.tensors}
        config["head_dim"] = config.get("head_dim") or 8
    write_gguf(tmp_path / "a.gguf", config, tensors)
    with open_checkpoint(tmp_path / "a.gguf") as read:
        assert read.vocab_digest() == "ab"
        assert read.draft_vocabulary().tolist() == [1, 5, 9]
        assert read.config["rope_theta"] == config["rope_parameters"]["rope_theta"]
        for name, values in tensors.items():
            assert np.abs(read_dense(read, name).numpy() - values).max() <= np.abs(values).max() / 240
    with pytest.raises(DistillError, match="multiples of 32"):
        write_gguf(tmp_path / "b.gguf", config, {"model.embed_tokens.weight": np.ones((4, 33), np.float32)})
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize("listed", [[], [3, 2], [1, 1], [-1, 2], [VOCAB], ["1"], "all", [1.5]])
def test_a_draft_vocabulary_is_checked(folder, listed):
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.draft_vocabulary() is None
        checkpoint.config["draft_vocabulary"] = listed
        with pytest.raises(CheckpointError, match="rising token ids from 0 to 63"):
            checkpoint.draft_vocabulary()


# A target that a swarm holds, and several processes.


async def test_a_swarm_teaches_what_the_model_knows(folder, turns, target):
    async with local_swarm(folder, [range(0, 1), range(1, 2)]) as swarm:
        taught = SwarmTarget(str(folder), [swarm.address], CPU_DEVICE)
        texts = await asyncio.to_thread(taught.sample, turns, 6, 64, 5)
        said = await asyncio.to_thread(taught.answers, [[USER_ID, 9, 10]], 8, SamplingParams())
    assert said == answers(target, [[USER_ID, 9, 10]], 8, SamplingParams())
    rows = texts.own[:, 1:].flatten().nonzero()[:, 0]
    assert len(rows) > 10
    student = torch.randn(len(rows), VOCAB)
    (lesson,), (known,) = (list(t.lessons(texts, rows, 10**6)) for t in (taught, target))
    # All 64 tokens are among the 64 likeliest: nothing is left to the student.
    assert torch.allclose(lesson(student), known(student).log_softmax(1), atol=1e-3)


def _work(world: World, folder: str) -> None:
    values = [torch.full((2,), float(world.rank)), torch.arange(3.0) * (world.rank + 1)]
    world.mean_(values)
    assert values[0].tolist() == [0.5, 0.5]
    assert values[1].tolist() == [0.0, 1.5, 3.0]
    assert world.agree(7.0 + world.rank) == 7.0
    if not world.leads and folder == "fail":
        raise DistillError("this one gives up")


@pytest.mark.full
def test_processes_share_gradients():
    together(_work, 2, "cpu", "")
    with pytest.raises(DistillError, match="this one gives up"):
        together(_work, 2, "cpu", "fail")
