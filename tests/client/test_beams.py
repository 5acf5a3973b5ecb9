"""Planning of beams, with scores out of a table: against transformers' own search over the same table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from petal.client.beams import BeamRules, BeamSearch, largest
from petal.client.scores import log_softmax
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB, EOS = 12, 3


class Table(PreTrainedModel, GenerationMixin):
    """Says of each text what a table has for its last two tokens."""

    config_class = PreTrainedConfig

    def __init__(self, seed: int) -> None:
        super().__init__(PreTrainedConfig(vocab_size=VOCAB))
        self.table = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)))

    def prepare_inputs_for_generation(self, input_ids: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Any, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=2 * self.table[input_ids[:, -2], input_ids[:, -1]][:, None])

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def ours(table: Table, rules: BeamRules, prompt: list[int], stops: Sequence[int]) -> BeamSearch:
    search = BeamSearch(rules, lambda ids: ids[-1] in stops or len(ids) == rules.limit)
    while not search.done:
        texts = torch.tensor([[*prompt, *beam.ids] for beam in search.running])
        with torch.no_grad():
            logits = table(texts).logits[:, -1].numpy()
        parents = search.advance(log_softmax(logits))
        assert all(parent < len(texts) for parent in parents)
    return search


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize(("num_beams", "stops"), [(2, [EOS]), (4, [EOS]), (3, [EOS, 5, 7]), (5, [])])
def test_as_transformers_plans(num_beams: int, stops: list[int], length_penalty: float, early_stopping: Any) -> None:
    lengths = set()
    for seed in range(6):
        table = Table(seed)
        rules = BeamRules(num_beams, 14, len(stops), length_penalty, early_stopping)
        found = ours(table, rules, [1, 2], stops).finished
        config = GenerationConfig(
            max_new_tokens=14, num_beams=num_beams, num_return_sequences=num_beams, do_sample=False, use_cache=False,
            length_penalty=length_penalty, early_stopping=early_stopping, eos_token_id=stops or None, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        theirs = table.generate(torch.tensor([[1, 2]]), generation_config=config)
        expected = [
            [id for id, origin in zip(row[2:], origins, strict=False) if origin >= 0]
            for row, origins in zip(theirs.sequences.tolist(), theirs.beam_indices.tolist(), strict=True)
        ]
        assert [list(beam.ids) for beam in found] == expected
        np.testing.assert_allclose([beam.score for beam in found], theirs.sequences_scores, rtol=1e-5)
        origins = [list(beam.origins) for beam in found]
        assert origins == [[o for o in row if o >= 0] for row in theirs.beam_indices.tolist()]
        lengths |= {len(beam.ids) for beam in found}
    # Long answers are preferred where the penalty is high, up to the limit.
    assert not stops or length_penalty > 1 or len(lengths) > 1


def test_the_first_of_equal_ones_is_taken() -> None:
    assert largest(np.array([1.0, 3.0, 3.0, -np.inf, 3.0]), 2) == [1, 2]
    assert largest(np.array([1.0, 3.0]), 5) == [1, 0]
