"""K-quants by a search of our own: Petal only reads them, and their quality is measured on weights that we round here.

Layouts are ggml's; that these bytes are well formed is checked with the public gguf package.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
# Parts of a group's range that are tried.
_PARTS = torch.linspace(1.05, 0.7, 15)


def encode(name: str, weight: Tensor) -> Tensor:
    """q4_k, q5_k or q6_k bytes of a matrix whose width divides by 256: [out, in] -> uint8 [out, bytes]."""
    blocks = weight.float().reshape(-1, BLOCK)
    packed = _q6(blocks) if name == "q6_k" else _q4_or_5(blocks, {"q4_k": 4, "q5_k": 5}[name])
    return packed.view(len(weight), -1)


def _q4_or_5(blocks: Tensor, bits: int) -> Tensor:
    """8 groups of 32 with a scale and a minimum of 6 bits each."""
    levels = 2**bits - 1
    groups = blocks.view(-1, 8, 32)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2)
    parts = _PARTS.to(blocks.device)
    scales = ((high - low).clamp(min=1e-8)[..., None] * parts) / levels
    lows = low[..., None] * parts
    codes = ((groups[:, :, None] - lows[..., None]) / scales[..., None]).round().clamp(0, levels)
    errors = ((codes * scales[..., None] + lows[..., None] - groups[:, :, None]) ** 2).sum(3)
    best = errors.argmin(2, keepdim=True)
    scale, minimum = scales.gather(2, best)[..., 0], -lows.gather(2, best)[..., 0]
    d, dmin = (x.amax(1, keepdim=True).div(63).half().float().clamp(min=1e-7) for x in (scale, minimum))
    six_scale, six_minimum = ((x / of).round().clamp(0, 63) for x, of in ((scale, d), (minimum, dmin)))
    step = (d * six_scale).clamp(min=1e-10)[..., None]
    codes = ((groups + (dmin * six_minimum)[..., None]) / step).round().clamp(0, levels).to(torch.uint8)
    heads = [_half(d), _half(dmin), _six_bits(six_scale.to(torch.uint8), six_minimum.to(torch.uint8))]
    if bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
        heads.append(((codes >> 4) << places).sum(1, dtype=torch.uint8))
    pairs = (codes & 15).view(-1, 4, 2, 32)
    return torch.cat((*heads, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)), 1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Two times 8 numbers of 6 bits in 12 bytes."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return torch.cat((first, second, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4), 1)


def _q6(blocks: Tensor) -> Tensor:
    """16 groups of 16 with a signed scale of 8 bits each."""
    groups = blocks.view(-1, 16, 16)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    tried = extreme / -32 * _PARTS.to(blocks.device)
    safe = tried.where(tried != 0, 1.0)[..., None]
    codes = (groups[:, :, None] / safe).round().clamp(-32, 31)
    best = ((codes * safe - groups[:, :, None]) ** 2).sum(3).argmin(2, keepdim=True)
    scale = tried.gather(2, best)[..., 0]
    d = (scale.abs().amax(1, keepdim=True) / 127).half().float().clamp(min=1e-7)
    eight = (scale / d).round().clamp(-128, 127)
    step = (d * eight)[..., None]
    codes = ((groups / step.where(step != 0, 1.0)).round().clamp(-32, 31) + 32).to(torch.uint8)
    quarters = codes.view(-1, 2, 4, 32)  # of each half of the block, four runs of 32
    low = torch.cat(
        (quarters[:, :, 0] & 15 | quarters[:, :, 2] << 4, quarters[:, :, 1] & 15 | quarters[:, :, 3] << 4), 2
    )
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = ((quarters >> 4) << places).sum(2, dtype=torch.uint8)
    return torch.cat((low.flatten(1), high.flatten(1), eight.to(torch.int8).view(torch.uint8), _half(d)), 1)


def _half(numbers: Tensor) -> Tensor:
    return numbers.half().view(torch.uint8)
