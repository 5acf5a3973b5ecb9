"""Text and ids through a swarm: batches of a tokenizer, models without a tokenizer that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BatchEncoding, LlamaForCausalLM

from ..protocol.gguf_maker import write_gguf
from ..support.swarms import local_swarm
from ..support.tiny import VOCAB, tiny_llama

IDS = [[5, 6, 7, 8], [9, 10]]


async def test_a_file_with_a_token_twice_serves_ids_and_says_why_not_text(tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama()).eval()
    write_gguf(tmp_path / "tiny.gguf", model, tokens=["twice", "twice", *(f"<{i}>" for i in range(2, VOCAB))])
    settings = {"max_new_tokens": 6, "drafter": "ngram", "eos_token_id": -1}
    async with local_swarm(tmp_path / "tiny.gguf", [range(4)], dtype="float32") as swarm, swarm.connect() as client:
        batch = BatchEncoding({"input_ids": IDS[:1], "attention_mask": [[1] * 4]})
        found = await client.generate(batch, **settings)
        assert found == model.generate(torch.tensor(IDS[:1]), max_new_tokens=6, eos_token_id=None).tolist()
        padded = BatchEncoding(
            {
                "input_ids": torch.tensor([IDS[0], [0, 0, *IDS[1]]]),
                "attention_mask": torch.tensor([[1] * 4, [0, 0, 1, 1]]),
            }
        )
        wanted = model.generate(**padded, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
        assert torch.equal(await client.generate(padded, **settings), wanted)
        with pytest.raises(ValueError, match=r"needs a tokenizer, give token ids: .*'twice' comes twice"):
            await client.generate("text", **settings)
        with pytest.raises(ValueError, match=r"a chat needs a tokenizer: .*'twice' comes twice"):
            client.chat()
        with pytest.raises(ValueError, match="top_logprobs and trace come with what stream"):
            await client.generate(IDS[0], top_logprobs=2)
        stop = int(wanted[0, 5])
        stopped = await client.generate(IDS[0], max_new_tokens=6, drafter="ngram", eos_token_id=torch.tensor([stop]))
        assert stopped[4:] == wanted[0, 4 : 4 + wanted[0, 4:].tolist().index(stop) + 1].tolist()
