"""Blocks of GGUF types taken apart: codes of a byte, and each group's numbers multiplied out in float32."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUT_OF = {"q4_0": "Q4_0", "q4_1": "Q4_1", "q8_0": "Q8_0", "q4_k": "Q4_1", "q5_k": "Q5_K", "q6_k": "Q6_K"}


def rows(kind: str, blocks: Tensor) -> dict[str, Tensor]:
    """blocks uint8 [out, blocks, size] -> codes [out, blocks, depths], scale and middle [out, blocks, groups].

    The middle is the weight of the code in the middle of the range.
    """
    return _TAKEN[kind](blocks)


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """Each run of bytes holds `run` low, then `run` high halves."""
    runs = packed.unflatten(-1, (-1, run))
    return torch.cat((runs & 15, runs >> 4), -1).flatten(-2)


def _q4_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[..., 2:], 16), "scale": _half(blocks, 0)}


def _q4_1(blocks: Tensor) -> dict[str, Tensor]:
    scale, low = _half(blocks, 0), _half(blocks, 2)
    return {"codes": _nibbles(blocks[..., 4:], 16), "scale": scale, "middle": low + 8 * scale}


def _q8_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": blocks[..., 2:], "scale": _half(blocks, 0)}


def _k_numbers(blocks: Tensor, middle: int) -> dict[str, Tensor]:
    """Scale and middle of the 8 groups of a block, whose 6-bit shares take 12 bytes."""
    low, high, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scale = torch.cat((low & 63, rest & 15 | low >> 2 & 48), -1)
    minimum = torch.cat((high & 63, rest >> 4 | high >> 2 & 48), -1)
    scale = _half(blocks, 0) * scale
    return {"scale": scale, "middle": middle * scale - _half(blocks, 2) * minimum}


def _q4_k(blocks: Tensor) -> dict[str, Tensor]:
    return {"codes": _nibbles(blocks[..., 16:], 32), **_k_numbers(blocks, 8)}


def _q5_k(blocks: Tensor) -> dict[str, Tensor]:
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[..., None, 16:48] >> places & 1).flatten(-2) << 4
    return {"codes": _nibbles(blocks[..., 48:], 32) | fifth, **_k_numbers(blocks, 16)}


def _q6_k(blocks: Tensor) -> dict[str, Tensor]:
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    upper = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> places & 3).flatten(-3) << 4
    scale = _half(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8)
    return {"codes": _nibbles(blocks[..., :128], 64) | upper, "scale": scale}


_TAKEN = {"q4_0": _q4_0, "q4_1": _q4_1, "q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
