"""Mixtures of experts on a card: grouped rows in one launch say what each expert says, whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from petal.kernels.cuda.experts import Experts, ExpertWeights, Grouping
from petal.kernels.cuda.layout import fields, interleave, pack, stacked
from petal.kernels.cuda.runtime import runtime
from petal.kernels.formats.base import FormatError
from torch import Tensor

from tests.kernels.cuda.layout_cases import CASES
from tests.kernels.quantized_weights import random_tensors

pytestmark = pytest.mark.cuda
WIDTH, INNER, COUNT, EACH = 768, 224, 6, 2


@pytest.fixture(scope="module")
def experts() -> Experts:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return Experts(runtime(torch.device("cuda", 0)))


def random_experts(case: str) -> tuple[ExpertWeights, list[tuple[Tensor, Tensor, Tensor]]]:
    """Packed, and gate, up and down of each expert in float64."""
    format = CASES[case][0]
    gate_up, down, dense = [], [], []
    for expert in range(COUNT):
        parts = []
        for place, shape in enumerate(((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))):
            tensors = {name: t.cuda() for name, t in random_tensors(format, shape, 3 * expert + place).items()}
            parts.append((fields(format, tensors, shape), format.dequantize(tensors, shape)))
        gate_up.append(pack(interleave(parts[0][0], parts[1][0])))
        down.append(pack(parts[2][0]))
        dense.append((parts[0][1], parts[1][1], parts[2][1]))
    return ExpertWeights(stacked(gate_up), stacked(down)), dense


def expected(dense: list[tuple[Tensor, Tensor, Tensor]], x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    out = torch.zeros(len(x), WIDTH, dtype=torch.float64, device=x.device)
    for row in range(len(x)):
        for choice, share in zip(chosen[row].tolist(), shares[row].double(), strict=True):
            if choice < 0:
                continue
            gate, up, down = dense[choice]
            v = x[row].double()
            out[row] += share * ((F.silu(v @ gate.T) * (v @ up.T)) @ down.T)
    return out


@pytest.mark.parametrize("case", ["int4", "bf16", "fp8", "q8_0"])
def test_rows_meet_their_experts(experts, case):
    weights, dense = random_experts(case)
    noise = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(150, WIDTH, device="cuda", generator=noise).bfloat16()
    chosen = torch.stack([torch.randperm(COUNT, device="cuda", generator=noise)[:EACH] for _ in range(150)]).int()
    chosen[7, 1] = -1
    shares = torch.rand(150, EACH, device="cuda", generator=noise)
    reference = expected(dense, x, chosen, shares)
    whole = experts(weights, x, chosen, shares)
    assert float((whole.double() - reference).norm() / reference.norm()) < 2e-2
    assert float((whole.double() - reference.roll(1, 0)).norm() / reference.norm()) > 0.5  # negative control
    for rows in (1, 3, 17, 64):
        part = experts(weights, x[:rows].contiguous(), chosen[:rows].contiguous(), shares[:rows].contiguous())
        assert torch.equal(part, whole[:rows]), rows
    order = torch.randperm(150, device="cuda", generator=noise)
    assert torch.equal(experts(weights, x[order], chosen[order], shares[order]), whole[order])


def test_all_rows_may_choose_the_same_expert(experts):
    weights, dense = random_experts("int4")
    x = torch.randn(40, WIDTH, device="cuda").bfloat16()
    chosen, shares = torch.full((40, 1), 4, dtype=torch.int32, device="cuda"), torch.ones(40, 1, device="cuda")
    reference = expected(dense, x, chosen, shares)
    found = experts(weights, x, chosen, shares)
    assert float((found.double() - reference).norm() / reference.norm()) < 2e-2
    assert not experts(weights, x, chosen - 9, shares).any()


@pytest.mark.parametrize("tile", [8, 16, 128])
@pytest.mark.parametrize("count", [1, 5, 128, 1000])
def test_slots_of_an_expert_lie_side_by_side(experts, count, tile):
    chosen = torch.randint(-1, count + 1, (301, 3), device="cuda", dtype=torch.int32)
    grouped = Grouping(experts._linear._runtime).group(chosen, count, tile)
    expert_of, row_of, slot_of = (t.tolist() for t in (grouped.expert_of, grouped.row_of, grouped.slot_of))
    used = set()
    for pair, (choice, slot) in enumerate(zip(chosen.flatten().tolist(), slot_of, strict=True)):
        if not 0 <= choice < count:
            assert slot == -1
            continue
        assert expert_of[slot // tile] == choice
        assert row_of[slot] == pair // 3
        used.add(slot)
    assert len(used) == sum(0 <= c < count for c in chosen.flatten().tolist())
    assert all(row == -1 for slot, row in enumerate(row_of) if slot not in used)
    assert all(expert == -1 or any(t * tile <= s < (t + 1) * tile for s in used) for t, expert in enumerate(expert_of))


def test_wrong_experts_are_refused(experts):
    with pytest.raises(ValueError, match="1 to 1024"):
        Grouping(experts._linear._runtime).group(torch.zeros(1, 1, dtype=torch.int32, device="cuda"), 1025, 8)
    first, second = (
        pack(fields(CASES[n][0], random_tensors(CASES[n][0], (64, 512)), (64, 512))) for n in ("int4", "int8")
    )
    with pytest.raises(FormatError, match="different layouts"):
        stacked([first, second])
