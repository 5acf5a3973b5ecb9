"""A small language model as drafter: any causal LM that transformers knows, with the target's vocabulary.

Runs on `peer/model`, which builds models and knows neither sockets nor sessions: the one thing that a client takes from
`peer/`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.registry import NoBackend, backend_for
from ...peer.model import Span, WeightPrecision, load_span
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError
from ...protocol.checkpoint.open import open_checkpoint
from ...protocol.checkpoint.tokenizer import Tokenizer
from ...protocol.wire.sampling import SamplingParams, TokenCounts
from .candidates import score_children
from .drafter import Drafter, DrafterError, ScoredTree
from .tree_builder import Ints, TreeBuilder
from .tree_cache import TreeCache

# Nodes of one forward, children a node, and candidates: greedy ones, and those among which noise may choose.
BEAMS = 12
BRANCH = 24
CANDIDATES, NOISY_CANDIDATES = 64, 256
# While a tree is in flight, the drafter grows its own to so many times the budget, as long as a forward over the nodes
# that come next meets one of them with this chance.
AHEAD = 3
AHEAD_CHANCE = 0.1
PREFILL_ROWS = 256


class DraftModel:
    """A draft model's weights in bfloat16, on a backend. Every sequence has a `ModelDrafter` of its own."""

    def __init__(self, name: str, span: Span, vocab_size: int, trimmed: Ints | None = None) -> None:
        """`trimmed` are the ids that the LM head computes, where it does not compute all (FR-Spec, 2502.14856)."""
        self.name = name
        self.span = span
        self.vocab_size = vocab_size
        # Of the columns of `logits`.
        self.backend = span.backend
        self.ids = torch.arange(vocab_size) if trimmed is None else torch.from_numpy(trimmed[trimmed < vocab_size])
        if trimmed is not None:
            head = span.model.get_output_embeddings()
            rows = head.rows(self.ids.to(self.backend.device))
            span.model.set_output_embeddings(self.backend.linear(rows, dtype=torch.bfloat16))
        self._idle: list[TreeCache] = []

    @classmethod
    def load(cls, source: str, tokenizer: Tokenizer, device: str = "cpu") -> DraftModel:
        """Read a checkpoint (folder, GGUF file or hub id). Raises DrafterError where it does not fit the target.

        device: what `backend_for` takes.
        """
        try:
            with open_checkpoint(source) as checkpoint:
                _check_vocabulary(checkpoint, tokenizer)
                weights = WeightPrecision(torch.bfloat16)
                span = load_span(checkpoint, 0, checkpoint.n_blocks, precision=weights, backend=backend_for(device))
                vocab_size = min(tokenizer.vocab_size, span.vocab_size)
                return cls(checkpoint.name, span, vocab_size, checkpoint.draft_vocabulary())
        except (CheckpointError, NoBackend) as error:
            raise DrafterError(f"no drafter in {source}: {error}") from error

    def cache_for(self, drafter: ModelDrafter) -> TreeCache:
        """A sequence's cache, empty. Another has it once the drafter is gone: what a device captured for it lasts."""
        cache = self._idle.pop() if self._idle else TreeCache(self.span)
        cache.truncate(0)
        weakref.finalize(drafter, self._idle.append, cache)
        return cache

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] -> [n, len(ids)], without the padding behind the vocabulary."""
        return self.span.logits(hidden)[:, : len(self.ids)].contiguous()

    def spread(self, logits: Tensor) -> Tensor:
        """[n, len(ids)] -> [n, vocab]: columns are token ids; -inf where the head computes nothing."""
        ids = self.ids.to(logits.device)
        return logits.new_full((len(logits), self.vocab_size), -torch.inf).index_copy_(1, ids, logits)


def _check_vocabulary(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Ids must mean the same to both; padding behind the vocabulary does not count."""
    try:
        own = checkpoint.vocab_digest()
    except CheckpointError:
        raise DrafterError(f"{checkpoint.name} brings no tokenizer, so nobody knows what its token ids mean") from None
    if own != tokenizer.vocab_digest:
        raise DrafterError(f"{checkpoint.name} has another vocabulary than the model; a drafter needs the very same")


class ModelDrafter(Drafter):
    """Grows a tree of one sequence with a draft model. Its KV cache follows the text: nothing is encoded twice."""

    heavy = True

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._cache = model.cache_for(self)
        self._params = SamplingParams()
        self._prompt_length = 0
        self._counts = TokenCounts()
        # The text that the draft model has seen, its last token the tree's root.
        self._ids: list[int] = []
        self._tree = TreeBuilder(-1)
        # Of the tree's nodes in the cache; -1 for the root and for those that the draft model has not seen.
        self._rows: Ints = np.array([-1])
        self._budget = 0

    def fresh(self) -> ModelDrafter:
        return ModelDrafter(self._model)

    def start(self, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self._params, self._prompt_length = sampling, len(prompt)
        self._forget(len(self._ids))

    def propose(self, ids: Sequence[int], budget: int, worth: float = 0.0) -> ScoredTree:
        self._budget = budget
        self._follow(list(ids))
        while len(nodes := self._tree.frontier(budget, BEAMS)) and np.exp(self._tree.scores[nodes]).sum() > worth:
            self._expand(nodes)
        return self._tree.best(budget)

    def ahead(self) -> bool:
        nodes = self._tree.frontier(AHEAD * self._budget, BEAMS)
        if not len(nodes) or np.exp(self._tree.scores[nodes]).sum() < AHEAD_CHANCE:
            return False
        self._expand(nodes)
        return True

    # Following the text.

    def _follow(self, ids: list[int]) -> None:
        """Make the last of `ids` the tree's root, by descending into the tree where it was foreseen."""
        if ids[: len(self._ids)] != self._ids or len(self._tree) == 1:
            self._forget(_common(self._ids, ids[:-1]))
        if self._params.penalized:
            self._counts = TokenCounts(ids[: self._prompt_length], ids[self._prompt_length :])
        node = 0
        for token in ids[len(self._ids) :]:
            child = self._tree.child(node, token)
            if child is None or not self._tree.expanded[child]:
                break
            node = child
        if node:
            self._commit(node)
        if len(self._ids) < len(ids):
            self._encode(ids[len(self._ids) :])

    def _forget(self, length: int) -> None:
        """Keep the first `length` tokens and no tree."""
        self._cache.truncate(length)
        del self._ids[length:]
        self._tree, self._rows = TreeBuilder(-1), np.array([-1])

    def _commit(self, node: int) -> None:
        """The text went on down to `node`, whose row is cached already."""
        path = self._path(node)
        self._ids += self._tree.tokens[path].tolist()
        below = self._tree.reroot(node)[1:]
        kept = np.sort(self._rows[below][self._rows[below] >= 0])
        self._cache.commit(self._rows[path].tolist(), kept.tolist())
        rows = np.where(self._rows[below] < 0, -1, np.searchsorted(kept, self._rows[below]))
        self._rows = np.concatenate(([-1], rows))

    def _encode(self, ids: list[int]) -> None:
        """Read tokens that were not foreseen; the last is the root of a new tree."""
        self._forget(len(self._ids))
        for start in range(0, len(ids), PREFILL_ROWS):
            piece = ids[start : start + PREFILL_ROWS]
            hidden = self._forward(piece, range(-1, len(piece) - 1))
            self._cache.commit(range(len(piece)))
            self._ids += piece
        self._tree, self._rows = TreeBuilder(ids[-1]), np.array([-1])
        self._grow(np.zeros(1, dtype=np.int64), hidden[-1:])

    # Growing the tree.

    def _expand(self, nodes: Ints) -> None:
        started = time.perf_counter()
        parents = self._rows[self._tree.parents[nodes]]
        self._rows[nodes] = np.arange(len(nodes)) + self._rows.max() + 1
        self._grow(nodes, self._forward(self._tree.tokens[nodes].tolist(), parents.tolist()))
        seconds = time.perf_counter() - started
        self.level_s += 0.2 * (seconds - self.level_s) if self.level_s else seconds

    def _path(self, node: int) -> list[int]:
        """Nodes from below the root down to `node`."""
        return [*self._tree.ancestors(node), node][1:]

    def _forward(self, ids: list[int], parents: Sequence[int]) -> Tensor:
        return self._cache.forward(ids, parents)

    def _grow(self, nodes: Ints, hidden: Tensor) -> None:
        """Add the children of nodes, given their last hidden states [n, d]."""
        logits, ids = self._model.logits(hidden), self._model.ids
        if self._params.penalized:
            logits, ids = self._model.spread(logits.float().cpu()), torch.arange(self._model.vocab_size)
            for row, node in zip(logits.numpy(), nodes.tolist(), strict=True):
                path = self._tree.tokens[self._path(node)].tolist()
                self._counts.penalize(row, self._params, path)
        candidates = NOISY_CANDIDATES if self._params.temperature else CANDIDATES
        topk = self._model.backend.topk(logits, min(candidates, logits.shape[1]))
        values, columns = (part.cpu() for part in topk)
        positions = len(self._ids) + self._tree.depths[nodes]
        tokens, logprobs = score_children(
            ids[columns].numpy(), values.double().numpy(), positions, self._params, BRANCH
        )
        self._tree.expand(nodes, tokens, logprobs)
        self._rows = np.concatenate((self._rows, np.full(len(self._tree) - len(self._rows), -1)))


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
