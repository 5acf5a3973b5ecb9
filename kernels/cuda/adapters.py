"""Low-rank adapters of several sessions in one pair of launches, beside products of any format (`src/adapters.cu`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.base import padded
from .compile import Program
from .experts import Grouped, Grouping
from .runtime import Runtime

_STEP, _PARTS, _WARPS = 16, 16, 4
_THREADS = 32 * _WARPS
_ROWS = 8  # of a tile
MOST_RANK = 256


def fragments(matrix: Tensor) -> Tensor:
    """[out, in], multiples of 16 -> [out / 16, in / 16, lane 32, register 4, 2] (`src/matrix.cuh`)."""
    v = matrix.unflatten(1, (-1, 2, 4, 2)).unflatten(0, (-1, 2, 8))  # tile h g, step c t e
    return v.permute(0, 3, 2, 5, 4, 1, 6).flatten(4, 5).flatten(2, 3).contiguous()


class Adapters:
    """Adapters of one matrix, each down [rank, in] and up [out, rank] with any scale multiplied in."""

    def __init__(self, runtime: Runtime, adapters: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Raises ValueError for shapes that do not belong together or ranks above 256."""
        self._runtime = runtime
        self.outputs, self.width = adapters[0][1].shape[0], adapters[0][0].shape[1]
        for down, up in adapters:
            if down.shape != (up.shape[1], self.width) or len(up) != self.outputs:
                raise ValueError(f"down {list(down.shape)} and up {list(up.shape)} do not adapt this matrix")
        rank = padded(max(len(down) for down, _ in adapters), _STEP)
        if rank > MOST_RANK:
            raise ValueError(f"adapters have ranks of up to {MOST_RANK}, not {rank}")
        self._depth = padded(self.width, _STEP * _PARTS * _WARPS)

        def whole(matrix: Tensor, rows: int, columns: int) -> Tensor:
            matrix = F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - len(matrix)))
            return fragments(matrix.bfloat16().to(runtime.device))

        self._down = torch.stack([whole(down, rank, self._depth) for down, _ in adapters])
        self._up = torch.stack([whole(up, padded(self.outputs, _STEP), rank) for _, up in adapters])
        self._program, self._rank = Program("adapters.cu", (("RANK", rank),)), rank

    @property
    def nbytes(self) -> int:
        return self._down.nbytes + self._up.nbytes

    def group(self, grouping: Grouping, adapter_of: Tensor) -> Grouped:
        """adapter_of: int32 [rows], below 0 for none; good for all matrices that have as many adapters."""
        return grouping.group(adapter_of[:, None], len(self._down), _ROWS)

    def add(self, x: Tensor, y: Tensor, grouped: Grouped) -> Tensor:
        """y [rows, out] += up (down x [rows, in]), both bfloat16 and contiguous, each row with its own adapter."""
        tiles = len(grouped.expert_of)
        partial = torch.empty(tiles, _PARTS, _ROWS, self._rank, device=x.device)
        rows = grouped.expert_of, grouped.row_of
        self._launch("shrink", (tiles, _PARTS), x, self._down, *rows, partial, self.width, self._depth // _STEP)
        blocks = -(-self.outputs // (_STEP * _WARPS))
        self._launch("expand", (tiles, blocks), y, self._up, *rows, partial, self.outputs)
        return y

    def _launch(self, name: str, grid: tuple[int, ...], *arguments: Tensor | int) -> None:
        kernel = self._runtime.kernel(self._program, name, _THREADS)
        assert kernel is not None
        kernel(grid, *arguments)
