"""A backend can be added without touching `peer/`: one that only this file knows serves a model end to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from petal.kernels import ops, registry
from petal.kernels.backend import Attend, Batch, BatchRunner, EagerRunner, Forward, KVStorage, LayerSpec
from petal.kernels.formats.base import QuantizedTensor
from petal.kernels.torch.backend import TorchBackend
from petal.kernels.torch.linear import TorchLinear
from petal.kernels.torch.storage import TorchKVStorage
from petal.peer.joining import ServeError
from torch import Tensor, nn

from ..support.swarms import local_swarm, spans
from ..support.tiny import tiny_llama

PROMPT = [1, 17, 42, 99, 7, 3, 200, 12]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": -1, "seed": 3}
BUCKETS = (8, 64, 512)


def meta_checked(calls: Counter[str], name: str, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What `compute` gives, of the shape that it gives for tensors without values."""
    expected = compute(*(x.to("meta") for x in inputs))
    result = compute(*inputs)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    calls[name] += 1
    return result


class CheckedLinear(TorchLinear):
    """A dense product in plain torch."""

    def __init__(self, calls: Counter[str], weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> None:
        super().__init__(torch.device("cpu"), weight, bias, dtype)
        self._calls = calls

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense(x.dtype)
        y = meta_checked(self._calls, "linear", lambda x, w: x @ w.T, x, weight)
        return y if self.bias is None else y + self.bias


class DenseStorage(TorchKVStorage):
    """Attention with a mask, all rows of a segment at once."""

    calls: Counter[str]

    def attention(self, metadata: Any) -> Attend:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            at = metadata[layer]
            ops.write(key, value, self.keys[layer], self.values[layer], at)
            self.calls["attend"] += 1
            out = [self._segment(layer, at, i, rows, query[asking], **options) for i, rows, asking in at.segments()]
            return torch.cat(out)

        return attend

    def _segment(self, layer: int, at: Any, index: int, rows: slice, query: Tensor, **options: Any) -> Tensor:
        assert not options.get("window")
        assert not options.get("softcap")
        base, count = int(at.base[index]), rows.stop - rows.start
        places = at.places(index, torch.arange(base + count))
        keys, values = (p.flatten(0, 1)[places] for p in (self.keys[layer], self.values[layer]))
        seen = torch.zeros(count, base + count, dtype=torch.bool)
        seen[:, :base] = True
        for row, parent in enumerate(at.parents[rows].tolist()):
            if parent >= 0:
                seen[row] = seen[parent]
            seen[row, base + row] = True
        group = query.shape[1] // keys.shape[1]

        def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            return nn.functional.scaled_dot_product_attention(
                q.transpose(0, 1), k, v, attn_mask=mask, scale=options["scale"]
            ).transpose(0, 1)

        return meta_checked(self.calls, "segment", compute, query, keys, values, seen)


class PaddedRunner(EagerRunner):
    """Static buffers of a few sizes, as a device with captured graphs has them; what leaves is a copy."""

    def __init__(self, calls: Counter[str], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._calls, self._buffers = calls, dict[tuple[int, ...], Tensor]()

    def run(self, batch: Batch) -> Tensor:
        rows, n = batch.rows, len(batch.rows)
        size = next(bucket for bucket in BUCKETS if n <= bucket)
        shape = (size, *rows.shape[1:])
        buffer = self._buffers.setdefault(shape, torch.zeros(shape, dtype=rows.dtype))
        buffer[:n] = rows
        self._calls[f"bucket {size}"] += 1
        return super().run(Batch(buffer[:n], batch.plan, batch.blocks)).clone()


class AbacusBackend(TorchBackend):
    """The third backend."""

    name = "abacus"

    def __init__(self, calls: Counter[str]) -> None:
        super().__init__(torch.device("cpu"))
        self.calls = calls

    def linear(
        self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> TorchLinear:
        assert isinstance(weight, Tensor)
        return CheckedLinear(self.calls, weight, bias, dtype)

    def silu_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return meta_checked(self.calls, "silu_gate", lambda gate, up: nn.functional.silu(gate) * up, gate, up)

    def kv_storage(
        self, layers: Sequence[LayerSpec], n_pages: int, page_size: int, dtype: torch.dtype = torch.float32
    ) -> TorchKVStorage:
        storage = DenseStorage(self.device, layers, n_pages, page_size, dtype)
        storage.calls = self.calls
        return storage

    def runner(self, forward: Forward, storage: KVStorage, group_of: Sequence[int]) -> BatchRunner:
        return PaddedRunner(self.calls, self, forward, storage, group_of)

    def encode(self, codec: str, rows: Tensor) -> memoryview:
        self.calls["encode"] += 1
        return super().encode(codec, rows)

    def scores(self, logits: Tensor) -> Sequence[Any]:
        self.calls["scores"] += 1
        return super().scores(logits)

    def arithmetic(self, dtype: torch.dtype) -> str:
        return "beads"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the third backend was asked for, registered for one test."""
    counted: Counter[str] = Counter()
    monkeypatch.setitem(registry.BACKENDS, "abacus", lambda device, building: AbacusBackend(counted))
    return counted


async def test_a_third_backend_serves_a_model(calls: Counter[str]) -> None:
    """Greedy text, drafted trees and a chain of two peers; the CPU's backend says the same."""
    texts = {}
    for device in ("cpu", "abacus"):
        async with local_swarm(tiny_llama(), spans(4, 2), device=device) as swarm, swarm.connect() as client:
            texts[device] = [
                await client.generate(PROMPT, drafter=drafter, **SETTINGS) for drafter in ("none", "ngram")
            ]
            assert swarm.peers[0].record().numerics.endswith("/beads") == (device == "abacus")
    assert texts["abacus"] == texts["cpu"]
    for asked in ("linear", "attend", "silu_gate", "bucket 8", "encode", "scores"):
        assert calls[asked] > 0, f"{asked} was computed elsewhere"


async def test_another_backend_says_something_else(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a gate that is wrong shows in the text, so the backend computes it."""
    monkeypatch.setattr(AbacusBackend, "silu_gate", lambda self, gate, up: gate * up)
    monkeypatch.setattr("petal.peer.model.verify._Sample._check_rows", lambda self: None)
    texts = {}
    for device in ("cpu", "abacus"):
        async with local_swarm(tiny_llama(), spans(4, 1), device=device) as swarm, swarm.connect() as client:
            texts[device] = await client.generate(PROMPT, drafter="none", **SETTINGS)
    assert texts["abacus"] != texts["cpu"]


async def test_exact_mode_and_unknown_devices_are_refused_by_the_backend(calls: Counter[str]) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"device": "abacus", "exact": True}, "exact cannot be promised"),
        ({"device": "nix"}, "no backend for the device 'nix'"),
    ]
    for options, said in wrong:
        with pytest.raises(ServeError, match=said):
            async with local_swarm(tiny_llama(), spans(4, 1), **options):
                pass
