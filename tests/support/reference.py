"""Plain transformers on the very weights that the swarm serves: what every exactness test compares with."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from petal.peer.model import read_dense
from petal.protocol.checkpoint.checkpoint import Checkpoint
from petal.protocol.checkpoint.open import open_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

DATA = Path(__file__).parents[1] / "data"
PROMPTS = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
GREEDY = DATA / "greedy.json"
NEW_TOKENS = 128
LONG_PROMPT = 1500


@functools.cache
def demo_checkpoint() -> Checkpoint:
    return open_checkpoint("demo")


def load_reference(checkpoint: Checkpoint) -> PreTrainedModel:
    """The whole model in float32, as transformers builds it."""
    fields = dict(checkpoint.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: read_dense(checkpoint, name) for name in checkpoint.tensors}
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True, assign=True)
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
    return model.eval()


@functools.cache
def demo_reference() -> PreTrainedModel:
    return load_reference(demo_checkpoint())


def prompt_ids() -> dict[str, list[int]]:
    """The 20 prompts in the chat template, and one of LONG_PROMPT tokens."""
    tokenizer = demo_checkpoint().tokenizer()
    ids = {p["id"]: tokenizer.apply_chat_template([{"role": "user", "content": p["text"]}]) for p in PROMPTS}
    text = "\n\n".join(p["text"] for p in PROMPTS)
    ids["long"] = tokenizer.encode("\n\n".join([text] * 4))[:LONG_PROMPT]
    assert len(ids["long"]) == LONG_PROMPT
    return ids


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, ids: list[int], last: int) -> torch.Tensor:
    """Logits of the last `last` rows of one teacher-forced pass, [last, vocab]."""
    return model(torch.tensor([ids]), logits_to_keep=last).logits[0]


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: list[int], new_tokens: int = NEW_TOKENS) -> tuple[list[int], list[float]]:
    """transformers' own greedy answer, end of text ignored, and its margin over the runner-up at every token."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits)[:, 0].topk(2, dim=-1).values
    return out.sequences[0, len(ids) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def main() -> None:
    """Write the committed expectation: `python -m tests.support.reference`."""
    model = demo_reference()
    expected = {}
    for name, ids in prompt_ids().items():
        answer, margins = greedy(model, ids)
        expected[name] = {"prompt": ids, "ids": answer, "margins": [round(m, 6) for m in margins]}
        print(name, len(ids), min(margins), flush=True)
    GREEDY.write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
