"""Which device computes: as asked for, or the best that there is; and what is said of one that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from petal.kernels import registry
from petal.kernels.backend import Backend
from petal.kernels.registry import NoBackend, backend_for


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with three cards, of which the second has most memory free; the devices that were asked for."""
    asked: list[str] = []

    def cuda(device: str, building: object) -> str:
        asked.append(device)
        return device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((5, 70, 9)[index] << 30, 80 << 30))
    monkeypatch.setitem(registry.BACKENDS, "cuda", cuda)
    return asked


def test_auto_takes_the_emptiest_card(cards: list[str]) -> None:
    backend_for("auto")
    assert cards == ["cuda:1"]


def test_auto_is_the_cpu_where_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend_for("auto").device.type == "cpu"


def test_a_card_that_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An old driver, say: the CPU computes, and the owner hears why."""

    def refuse(device: str) -> None:
        raise NoBackend(f"the device {device!r} cannot be used here: the driver is too old.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(registry, "_there", refuse)
    monkeypatch.setattr(registry, "DRIVER", Path("/"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert backend_for("auto").device.type == "cpu"
    assert [record.message for record in caplog.records] == [
        "this machine has an NVIDIA card, but the device 'cuda' cannot be used here: the driver is too old; computing "
        "on the CPU"
    ]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nand more"), "other programs fill its memory."),
        (RuntimeError("Found no NVIDIA driver on your system.\nand more"), "Found no NVIDIA driver on your system."),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled."),
        (RuntimeError(""), "RuntimeError."),
    ],
    ids=["busy", "no driver", "no CUDA", "no words"],
)
def test_one_sentence_says_why_a_device_cannot_be_used(
    raised: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(*size: int, **options: object) -> None:
        raise raised

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(registry.torch, "zeros", zeros)
    with pytest.raises(NoBackend) as error:
        backend_for("cuda")
    assert str(error.value) == f"the device 'cuda' cannot be used here: {said}"


def test_a_card_past_the_last_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(NoBackend, match="the cards here are cuda:0 to cuda:1"):
        backend_for("cuda:2")


def test_rocm_wants_a_torch_that_has_it() -> None:
    if torch.version.hip is None:
        with pytest.raises(NoBackend, match="this torch is built without ROCm"):
            backend_for("rocm")


def test_a_peer_fills_its_share_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free, or less where the share is less; what this process holds already counts."""
    from petal.kernels.cuda.backend import CudaBackend

    backend: Backend = object.__new__(CudaBackend)
    backend.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    found = []
    for share in (1.0, 0.75, 0.1):
        backend.memory_share = share
        found.append(backend.free_bytes(0))
    assert found == [60, 50, 0]
