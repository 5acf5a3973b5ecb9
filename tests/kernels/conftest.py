from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from petal.kernels.cpu.isa import TORCH, VARIABLE, isas
from petal.kernels.cpu.library import kernels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test computes; `pytest -m cuda` runs those of a GPU alone."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@contextmanager
def fresh_kernels() -> Iterator[None]:
    """Kernels are chosen anew inside, for what the environment says there, and forgotten afterwards."""
    kernels.cache_clear()
    try:
        yield
    finally:
        kernels.cache_clear()


def other_isa() -> str:
    """The best instruction set here whose products have other bits than those of the best of all."""
    best, *rest = isas()
    return next((isa.name for isa in rest if isa.arithmetic != best.arithmetic), best.name)


@pytest.fixture(params=["native", "torch"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the native kernels and with the torch backend, which stands in for them.

    "other" is another arithmetic than "native": where the processor has a matrix unit, that of doing without.
    """
    named = {"native": "", "other": other_isa(), "torch": TORCH}
    monkeypatch.setenv(VARIABLE, named[request.param])
    with fresh_kernels():
        if request.param != "torch" and kernels() is None:
            pytest.skip("no C compiler")
        yield request.param
