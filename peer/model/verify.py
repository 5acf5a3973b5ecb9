"""A fresh span is compared with transformers' own way to run its modules, which decides how it will be run.

Nothing here knows a family. A span that gives other hidden states when its rows are cut in two, when its blocks run one
by one, or behind another prompt needs more than hidden states, keys and values, and is refused. One whose rows give the
same in a ragged row as in transformers' own attention runs ragged, any other runs cached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ...kernels.backend import Attend, Batch, EagerRunner, LayerSpec
from ...kernels.metadata import BatchPlan
from ...protocol.checkpoint.layout import CheckpointError
from .fused import FusedSpan, written_alike
from .hooks import EAGER, RAGGED, ForwardContext, choose_attention, current, ragged_attention
from .span import NoKeysValues, Span, attention_options
from .verify_far import check_far

log = logging.getLogger(__name__)

_PROBE = "petal-probe"
_ROWS = 6
_PAGE = 16
# Largest difference as a share of what the blocks change. Wrong attention differs by tenths.
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2}
_MASKED = -1e30
# The kinds of `layer_types` that cache keys and values of their own.
_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_PIECES = 0  # the window of a pattern that has none


class _NotRagged(Exception):
    """Why a span cannot run ragged."""


def verify(span: Span, prologue: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Fill in `span.layers`, `span.ragged` and `span.fused`.

    prologue: modules that work before the first block. dtype: of the weights.

    Raises CheckpointError for a span that cannot be served.
    """
    family = type(span.model).__name__
    # What modules of any author may raise is without number.
    try:
        # Rows on either side of a border of the rope are as good as two models.
        ends = (*span.rope_borders, span.context_length)
        samples = [_Sample(span, prologue, _TOLERANCE[dtype], end) for end in ends]
        for sample in samples:
            sample.check_cuts()
    except CheckpointError:
        raise
    except NoKeysValues as error:
        raise _stateful(family) from error
    except Exception as error:
        if kinds := set(getattr(span.model.config.get_text_config(), "layer_types", None) or ()) - _KINDS:
            raise CheckpointError(
                f"{family} cannot be served: it has blocks of the kind {', '.join(sorted(kinds))}, which remember by "
                "more than keys and values."
            ) from error
        raise CheckpointError(
            f"{family} cannot be served: a pass over transformers' cache fails ({type(error).__name__}: {error})."
        ) from error
    sample = samples[-1]
    try:
        for sample in samples:
            sample.check_ragged()
        check_far(span, sample.specs, sample.tolerance)
    except Exception as error:
        log.debug("%s runs cached: %s: %s", family, type(error).__name__, error)
        choose_attention(span.model, EAGER)
        span.layers, span.ragged = sample.specs, False
        return
    try:
        sample.try_fused()
    except Exception as error:
        log.debug("%s runs module by module: %s: %s", family, type(error).__name__, error)
        span.fused = None


class _Sample:
    """A few rows, of a sequence of `extent`, that go through a span in every way that should not matter."""

    def __init__(self, span: Span, prologue: Sequence[nn.Module], tolerance: float, extent: int) -> None:
        self.span, self.prologue, self.tolerance, self.extent = span, prologue, tolerance, extent
        self.device = span.backend.device
        self.positions = torch.arange(_ROWS, device=self.device)
        self.rows, self.others = self._rows(0), self._rows(1)
        self.entry = self._through(ForwardContext(range(0)), self.rows)
        self.whole, cached = span.forward_cached(self.rows[None], [], extent=extent)
        self.plain = True  # attention has neither a softcap nor sinks
        self.specs = [LayerSpec(k.shape[1], k.shape[3], v.shape[3], None) for k, v in cached]

    def check_cuts(self) -> None:
        """Raise CheckpointError unless rows and blocks may be cut anywhere."""
        span, cut = self.span, _ROWS // 2
        _, past = span.forward_cached(self.rows[None, :cut], [], extent=self.extent)
        second, _ = span.forward_cached(self.rows[None, cut:], past, extent=self.extent)
        if self._differs(second[0], slice(cut, None)):
            raise _stateful(type(span.model).__name__)
        hidden = self.entry
        with _other_weights(self.prologue):
            for block in range(span.start, span.end):
                context = ForwardContext(range(block, block + 1), hidden[None], extent=self.extent)
                hidden = self._through(context, self.others)
        if self._differs(hidden):
            raise _stateful(type(span.model).__name__)

    def check_ragged(self) -> None:
        """Have the span run ragged, or raise whatever tells that it cannot."""
        span = self.span
        span.layers = self._probe()
        span.ragged = True
        choose_attention(span.model, RAGGED)
        self._check_rows()

    def try_fused(self) -> None:
        """Have the span run in few calls, or raise whatever tells that it cannot."""
        span = self.span
        if self.plain and not span.rope_borders and written_alike(span.model):
            windows = [spec.window for spec in span.layers]
            span.fused = FusedSpan(span.model.base_model, span.start, windows, span.backend, span.whole)
            (self._check_pages if span.whole else self._check_rows)()

    def _check_rows(self) -> None:
        """Rows in any order, and a stranger far away in the same forward."""
        order = torch.tensor([0, 3, 1, 5, 2, 4, 0], device=self.device)
        session = torch.tensor([0] * _ROWS + [1], device=self.device)
        positions = self.positions[order]
        positions[-1] = self.extent - 1
        hidden = self.span.forward(self.rows[order], positions, _attention(session, positions), extent=self.extent)
        if self._differs(hidden[order[:-1].argsort()]):
            raise _NotRagged("rows of a ragged row differ from transformers' own attention")

    def _check_pages(self) -> None:
        """Rows of a sequence over pages, and a stranger in the same forward."""
        span, sequence = self.span, range(_ROWS)
        storage = span.backend.kv_storage(span.layers, 2, _PAGE, span.backend.kv_dtypes[0])
        plan = BatchPlan([_ROWS, 1], [0, 0], [*sequence, 0], [*(i - 1 for i in sequence), -1], [[[0], [1]]], _PAGE)
        runner = EagerRunner(span.backend, span.forward_at(self.extent), storage, [0] * len(span.layers))
        hidden = runner.run(Batch(self.rows[[*sequence, 0]], plan, range(span.start, span.end)))
        if self._differs(hidden[:_ROWS]):
            raise _NotRagged("blocks computed whole differ from transformers' own")

    def _rows(self, seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        if self.span.start == 0:
            return torch.randint(self.span.vocab_size, (_ROWS,), generator=noise).to(self.device)
        return torch.randn(_ROWS, self.span.hidden_size, generator=noise).to(self.device, self.span.backend.stream)

    @torch.inference_mode()
    def _through(self, context: ForwardContext, rows: Tensor) -> Tensor:
        return self.span.through(context, rows[None])[0]

    def _differs(self, hidden: Tensor, rows: slice = slice(None)) -> bool:
        change = (self.whole[0] - self.entry).abs().max()
        return not bool((hidden - self.whole[0, rows]).abs().max() <= self.tolerance * change)

    def _probe(self) -> list[LayerSpec]:
        """What each block caches, and its window by the mask that its model makes; raises _NotRagged for a bias."""
        span, found = self.span, dict[int, LayerSpec]()
        attend = _attention(torch.zeros_like(self.positions), self.positions)
        context = ForwardContext(range(span.start, span.end), extent=self.extent)

        def record(
            block: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
        ) -> Tensor:
            if block in found:
                raise _NotRagged("a block attends twice")
            if mask is None:
                raise _NotRagged("a block attends without a mask")
            window = context.windows[round(mask.min().item() / _MASKED) - 1]
            if window == _PIECES:
                raise _NotRagged("a row sees positions in pieces")
            distance = self.positions[:, None] - self.positions
            seen = (distance >= 0) & (distance < (window or _ROWS))
            if not torch.equal(mask == 0, seen.cpu().expand_as(mask)):
                raise _NotRagged("a block adds a bias to its scores")
            self.plain &= options.get("softcap") is None and options.get("s_aux") is None
            found[block] = LayerSpec(key.shape[1], key.shape[2], value.shape[2], window)
            return attend(block, query, key, value, window=window, **attention_options(query, options))

        context.attend = record
        choose_attention(span.model, _PROBE)
        self._through(context, self.rows)
        if len(found) != span.end - span.start:
            raise _NotRagged("blocks do not use the attention interface")
        return [found[block] for block in range(span.start, span.end)]


@contextmanager
def _other_weights(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Ones in place of all parameters: what depends on them shows."""
    saved = [dict(module._parameters) for module in modules]
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                ones = torch.ones((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(ones, requires_grad=False)
    try:
        yield
    finally:
        for module, parameters in zip(modules, saved, strict=True):
            module._parameters.update(parameters)


def _stateful(family: str) -> CheckpointError:
    return CheckpointError(
        f"{family} cannot be served: its blocks need more than hidden states and keys and values of their own, as "
        "state-space, linear-attention, bidirectional and cache-sharing layers do."
    )


def _attention(session: Tensor, positions: Tensor) -> Attend:
    """Plain attention of rows in any order: a row sees rows of its session up to its own position."""

    def attend(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        scores = torch.einsum("nhd,mhd->hnm", query, key.repeat_interleave(group, 1)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = positions[:, None] - positions
        seen = (session[:, None] == session) & (distance >= 0) & (distance < (window or torch.inf))
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(query), 1)), 2)
        weights = scores.softmax(2)[:, :, : len(key)]
        return torch.einsum("hnm,mhd->nhd", weights, value.repeat_interleave(group, 1)).contiguous()

    return attend


def _note_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """transformers' mask interface: the mask, in values that tell which of the forward's masks it is."""
    assert mask_function is not None
    context = current()
    context.windows.append(_window_of(mask_function, options["config"].get_text_config()))
    rows, columns = torch.arange(q_length) + q_offset, torch.arange(kv_length) + kv_offset
    seen = _seen(mask_function, rows, columns)
    return torch.where(seen, 0.0, _MASKED * len(context.windows)).expand(batch_size, 1, q_length, kv_length)


def _window_of(mask_function: Callable[..., Tensor], config: Any) -> int | None:
    """How many positions back a row sees, itself included: None for all, _PIECES where that is no number."""
    last = (getattr(config, "max_position_embeddings", None) or 2048) - 1
    windows = set()
    for row in {last, last // 2, last // 3}:
        seen = _seen(mask_function, torch.tensor([row]), torch.arange(row + 1))[0]
        first = int(seen.int().argmax())
        if not seen[first:].all():
            return _PIECES
        windows.add(row + 1 - first if first else None)
    if len(windows - {None}) > 1:
        return _PIECES
    return max(windows, key=lambda window: window or 0)


def _seen(mask_function: Callable[..., Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.long)
    return mask_function(zero, zero, rows[:, None], columns[None]).expand(len(rows), len(columns))


AttentionInterface.register(_PROBE, ragged_attention)
AttentionMaskInterface.register(_PROBE, _note_mask)
