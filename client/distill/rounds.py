"""Tokens a round: what trees of a drafter would have brought along continuations that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import walk
from ..drafting.candidates import score_children
from ..drafting.tree_builder import Ints, TreeBuilder

_CANDIDATES = 128
_BRANCH = 24
# A level that promises fewer accepted tokens is not tried.
_WORTH = 0.02


@dataclass
class _Text:
    """A continuation of a prompt, and how much of it is out: the first token comes with the prompt."""

    prompt: Sequence[int]
    known: Sequence[int]
    out: int = 1

    def context(self) -> list[int]:
        return [*self.prompt, *self.known[: self.out]]

    def take(self, tree: TreeBuilder, budget: int) -> int:
        """One round's gain."""
        rest = self.known[self.out :]
        accepted, _ = walk(tree.best(budget), lambda _, path: rest[len(path)] if len(path) < len(rest) else -1)
        gained = min(len(accepted), len(rest))
        self.out += gained
        return gained


@torch.no_grad()
def tokens_a_round(
    student: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    budget: int,
    params: SamplingParams,
) -> float:
    """Mean over all rounds of accepted nodes, row 0 included. Contexts are computed anew, all in one batch."""
    texts = [_Text(prompt, known) for prompt, known in zip(prompts, answers, strict=True)]
    gains: list[int] = []
    while live := [text for text in texts if text.out < len(text.known)]:
        trees = _grow(student, [text.context() for text in live], budget, params)
        gains += [text.take(tree, budget) for text, tree in zip(live, trees, strict=True)]
    return sum(gains) / len(gains)


def _grow(
    student: LlamaForCausalLM, contexts: list[list[int]], budget: int, params: SamplingParams
) -> list[TreeBuilder]:
    trees = [TreeBuilder(context[-1]) for context in contexts]
    while sum(map(len, todo := [_frontier(tree, budget) for tree in trees])):
        columns, values = _likeliest(student, contexts, trees, todo)
        at = 0
        for context, tree, nodes in zip(contexts, trees, todo, strict=True):
            rows = slice(at, at + len(nodes))
            positions = len(context) + tree.depths[nodes]
            tree.expand(nodes, *score_children(columns[rows], values[rows], positions, params, _BRANCH))
            at += len(nodes)
    return trees


def _frontier(tree: TreeBuilder, budget: int) -> Ints:
    nodes = tree.frontier(budget, budget)
    return nodes if np.exp(tree.scores[nodes]).sum() > _WORTH else nodes[:0]


def _likeliest(
    student: LlamaForCausalLM, contexts: list[list[int]], trees: list[TreeBuilder], todo: list[Ints]
) -> tuple[Ints, np.ndarray]:
    """Ids and logits of the likeliest successors of all nodes `todo`, one row each."""
    inputs = [_inputs(context, tree, nodes) for context, tree, nodes in zip(contexts, trees, todo, strict=True)]
    length = max(len(ids) for ids, *_ in inputs)
    ids = torch.zeros(len(inputs), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(inputs), 1, 1)
    for row, (tokens, places, seen, _) in enumerate(inputs):
        n = len(tokens)
        ids[row, :n], positions[row, :n], mask[row, :n, :n] = tokens, places, seen
    hidden = student.model(
        input_ids=ids.to(student.device),
        position_ids=positions.to(student.device),
        attention_mask=mask[:, None].to(student.device),
        use_cache=False,
    ).last_hidden_state
    wanted = torch.cat([hidden[row, slots] for row, (*_, slots) in enumerate(inputs)])
    best = student.lm_head(wanted).float().topk(min(_CANDIDATES, student.config.vocab_size))
    return best.indices.cpu().numpy(), best.values.double().cpu().numpy()


def _inputs(context: list[int], tree: TreeBuilder, nodes: Ints) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Ids, positions and what sees what, of the context and the paths to `nodes`; and the slots of `nodes`."""
    paths = {node: [*tree.ancestors(node)[1:], node] if node else [] for node in nodes.tolist()}
    shown = sorted({node for path in paths.values() for node in path})
    n = len(context)
    slot = {0: n - 1} | {node: n + i for i, node in enumerate(shown)}
    seen = torch.ones(n + len(shown), n + len(shown), dtype=torch.bool).tril()
    seen[n:, n:] = False
    for node in shown:
        seen[slot[node], [slot[other] for other in [*tree.ancestors(node)[1:], node]]] = True
    places = torch.tensor([*range(n), *(n - 1 + int(tree.depths[node]) for node in shown)])
    tokens = torch.tensor([*context, *tree.tokens[shown].tolist()] if shown else context)
    return tokens, places, seen, [slot[node] for node in paths]
