"""`petal distill` as a whole, on a tiny target: what comes out, what outlives a kill, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from petal.client.distill import run as run_module
from petal.client.distill.run import Options, distill
from petal.client.distill.shape import DistillError, shape_for
from petal.client.distill.student import new_student
from petal.client.distill.train import Trainer
from petal.client.drafting.drafter import DrafterError
from petal.client.drafting.model import DraftModel, ModelDrafter
from petal.peer.model import read_dense
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.wire.sampling import SamplingParams
from transformers import AutoModelForCausalLM

from ...support.commands import petal
from .target_files import VOCAB, write_target

SIZE = 60_000
# Sampling a part takes what it takes, so that this is mostly training.
MINUTES = 0.05


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def made(target, tmp_path_factory) -> Path:
    """The folder of a drafter, with a GGUF file beside it."""
    folder = tmp_path_factory.mktemp("made")
    distill(Options(str(target), folder / "out", SIZE, MINUTES, gguf=folder / "drafter.gguf", head=0.5))
    return folder / "out"


def test_the_drafter_loads_everywhere(made, target):
    model, info = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(info.values())
    assert sum(p.numel() for p in model.parameters()) <= SIZE
    with open_checkpoint(target) as theirs, open_checkpoint(made) as folder:
        tokenizer = theirs.tokenizer()
        assert folder.tokenizer().vocab_digest == tokenizer.vocab_digest
        assert folder.tokenizer().chat_template == tokenizer.chat_template
        for path in (made, made.parent / "drafter.gguf"):
            draft = DraftModel.load(str(path), tokenizer)
            assert len(draft.ids) == VOCAB // 2
            tree = ModelDrafter(draft).propose([1, 7, 8, 9, 3], 8)
            assert len(tree) > 1
            assert set(tree.ids[1:]) <= set(draft.ids.tolist())
    assert (made.parent / "drafter.gguf").stat().st_size < 1.1 * (made / "model.safetensors").stat().st_size


def test_penalties_meet_a_trimmed_head(made, target):
    with open_checkpoint(target) as theirs:
        draft = DraftModel.load(str(made), theirs.tokenizer())
    free, bound = ModelDrafter(draft), ModelDrafter(draft)
    ids = [1, 7, 8, 9, 3]
    favourite = free.propose(ids, 4).ids[1]
    bound.start([*ids[:-1], favourite], SamplingParams(presence_penalty=100.0))
    bound.start([*ids], SamplingParams(repetition_penalty=100.0, presence_penalty=100.0))
    tree = bound.propose([*ids, favourite, 3], 4)
    assert set(tree.ids[1:]) <= set(draft.ids.tolist())
    assert favourite not in tree.ids[1:]


def test_the_card_has_the_figures(made):
    figures = json.loads((made / "figures.json").read_text())
    names = [f"tokens_per_round_k{k}_{t}" for t in ("t0", "t1") for k in (8, 32)]
    assert list(figures) == ["top1", "top4", "top8", "tv", *names]
    assert 0 <= figures["top1"] <= figures["top4"] <= figures["top8"] <= 1
    assert all(figures[name] >= 1 for name in names)
    assert f"| top1 | {figures['top1']:.3f} |" in (made / "README.md").read_text()


def test_it_has_learnt_something(made, target):
    """The negative control is the same drafter before its training."""
    with open_checkpoint(target) as checkpoint:
        matrix = read_dense(checkpoint, checkpoint.layout.token_matrix)
    untrained = new_student(shape_for(SIZE, VOCAB), matrix, {}, 0).eval()
    trained = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(target)
    ids = torch.randint(4, VOCAB, (8, 48), generator=torch.Generator().manual_seed(1))

    def distance(model):
        with torch.inference_mode():
            return (model(ids).logits.softmax(-1) - theirs(ids).logits.softmax(-1)).abs().sum(-1).mean().item()

    assert distance(trained) < distance(untrained)


def test_a_finished_folder_is_left_alone(made, target):
    before = (made / "model.safetensors").read_bytes()
    with pytest.raises(DistillError, match="finished model"):
        distill(Options(str(target), made, SIZE, MINUTES))
    assert (made / "model.safetensors").read_bytes() == before
    assert not (made / "unfinished").exists()


class _Killed(BaseException):
    """A process that is killed runs no handler for it."""


def test_a_killed_run_goes_on(target, tmp_path, monkeypatch):
    save, steps = Trainer.save, []

    def dies_after_saving(self, path):
        save(self, path)
        steps.append(self.step)
        raise _Killed

    out = tmp_path / "out"
    options = Options(str(target), out, SIZE, MINUTES)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", dies_after_saving)
        with pytest.raises(_Killed):
            distill(options)
    assert not (out / "model.safetensors").exists()
    # What a kill in the middle of a write leaves.
    (out / "unfinished" / "state.part").write_bytes(b"half")
    with pytest.raises(DistillError, match="other settings"):
        distill(Options(str(target), out, SIZE, MINUTES, seed=1))

    def no_sampling(*_):
        raise AssertionError("what was sampled is not sampled again")

    monkeypatch.setattr(run_module.dialogues, "sample", no_sampling)
    monkeypatch.setattr(Trainer, "save", lambda self, path: (save(self, path), steps.append(self.step)))
    distill(options)
    assert steps == sorted(steps)
    assert (out / "model.safetensors").exists()
    assert not (out / "unfinished").exists()


def test_text_in_place_of_dialogues(tmp_path):
    target = write_target(tmp_path, template=None)
    with pytest.raises(DistillError, match=r"no chat template.*--data"):
        distill(Options(str(target), tmp_path / "out", SIZE, MINUTES))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 7}" for i in range(2000)))
    distill(Options(str(target), tmp_path / "out", SIZE, MINUTES, data=text))
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds 0 tokens"),
        ("a.txt", b"w1 w2", "fewer than one row"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", b'{"words": "w1"}', 'field "text"'),
        (None, b"", "UTF-8"),
    ],
)
def test_bad_data(target, tmp_path, name, content, message):
    data = tmp_path / (name or "missing.txt")
    if name:
        data.write_bytes(content)
    with pytest.raises(DistillError, match=message):
        distill(Options(str(target), tmp_path / "out", SIZE, MINUTES, data=data))


def test_another_vocabulary_is_refused(made):
    with open_checkpoint("demo") as demo, pytest.raises(DrafterError, match="another vocabulary"):
        DraftModel.load(str(made.parent / "drafter.gguf"), demo.tokenizer())


def test_too_little_memory_is_said_before_anything_starts(target, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "free_bytes", lambda kind: 4_000_000)
    with pytest.raises(DistillError, match=r"--size .*M fits"):
        distill(Options(str(target), tmp_path / "out", 1_000_000, MINUTES))
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_what_is_wrong(target, tmp_path):
    words = ("distill", target, "--out", tmp_path / "out", "--size")
    assert "--size is a number of parameters such as 16M" in petal(*words, "big").line("petal")
    assert "is too small for 64 tokens" in petal(*words, "1K").line("petal")
