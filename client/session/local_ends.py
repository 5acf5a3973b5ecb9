"""The model's ends on this machine: what embeds tokens before the swarm's blocks and draws behind them.

Runs on `peer/model`, as draft models do. No token id leaves this machine, and no score comes back: the first stage
gets embeddings, the last returns hidden states. That hides nothing from a peer that compares them with the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.registry import NoBackend, backend_for
from ...peer.model import Ends, load_ends, precision_of
from ...protocol import petal_pb2 as pb
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.digest import part_digest
from ...protocol.checkpoint.layout import CheckpointError
from ...protocol.checkpoint.open import open_checkpoint
from ...protocol.errors import PetalError
from ...protocol.wire.codec import encode
from ...protocol.wire.limits import PART_BYTES
from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import DraftTree, RowTree, chain
from ...protocol.wire.verification import Reshape, TokenHistory, VerificationResult, draw_after_prefill, verify

_DTYPES = ("float32", "bf16")


class LocalEndsError(PetalError, ValueError):
    """Why this machine cannot hold the model's ends, in one sentence."""


class LocalEnds:
    """Embedding, final norm, LM head and sampler of one model; one serves all sessions."""

    def __init__(self, ends: Ends) -> None:
        self._ends = ends

    @classmethod
    def load(cls, source: str, last: pb.PeerRecord, exact: bool) -> LocalEnds:
        """As the last stage holds them: the same weights in the same dtype and quantization, in exact mode bit by bit.

        source: folder, GGUF file or hub id. Raises LocalEndsError.
        """
        if last.dtype not in _DTYPES:
            raise LocalEndsError(f"peers compute in {last.dtype}; local ends do in {' or '.join(_DTYPES)}")
        try:
            with open_checkpoint(source) as checkpoint:
                precision = precision_of(checkpoint, last.quantization or "none", last.dtype)
                backend = backend_for()
                if exact:
                    theirs = last.numerics.rpartition("/")[2]
                    backend = backend.in_arithmetic(theirs, precision.product_dtype) or backend
                numerics = precision.numerics(backend)
                if exact and numerics != last.numerics:
                    raise LocalEndsError(
                        f"exact mode needs one arithmetic: here it is {numerics}, on peers {last.numerics}"
                    )
                _check_weights(checkpoint, last)
                return cls(load_ends(checkpoint, precision, backend))
        except (CheckpointError, NoBackend) as error:
            raise LocalEndsError(f"no local ends in {source}: {error}") from error

    def most_rows(self, row_bytes: int) -> int:
        """Rows of embeddings that one frame carries."""
        return PART_BYTES // row_bytes

    async def embed(self, step: pb.Step, codec: pb.Codec) -> None:
        """Put embeddings in place of a step's token ids."""
        tree = RowTree(tuple(step.parents)) if step.parents else chain(len(step.ids))
        positions = [step.base + depth for depth in tree.depths]
        rows = await asyncio.to_thread(self._ends.embed, torch.tensor(step.ids), torch.tensor(positions))
        step.embeddings = encode(codec, rows.float().cpu().numpy())
        step.ClearField("ids")

    async def draw(
        self,
        hidden: NDArray[np.float32],
        tree: DraftTree | None,
        params: SamplingParams,
        history: TokenHistory,
        top_logprobs: int,
        reshape: Reshape | None,
    ) -> tuple[VerificationResult, Sequence[NDArray[np.float32]]]:
        """What the last stage would say of its hidden states [rows, d], of a tree or of a prompt's last chunk.

        With the logits of each row, [vocab]; of a chunk those of its last row. Raises SamplingError.
        """

        def work() -> tuple[VerificationResult, Sequence[NDArray[np.float32]]]:
            rows = hidden[-1:] if tree is None else hidden
            logits = self._ends.scores(torch.tensor(rows))
            if tree is None:
                verdict = draw_after_prefill(logits[0], params, history, top_logprobs, reshape)
            else:
                verdict = verify(tree, logits, params, history, len(history.ids), top_logprobs, reshape)
            return verdict, logits

        return await asyncio.to_thread(work)


def _check_weights(checkpoint: Checkpoint, last: pb.PeerRecord) -> None:
    stored = {"norm": last.norm_digest, "head": last.head_digest}
    for part, digest in stored.items():
        if digest and part_digest(checkpoint, checkpoint.layout.part(part)) != digest.hex():
            raise LocalEndsError(
                f"the {part} of {checkpoint.name} here differs from that of the peers; take their file"
            )
