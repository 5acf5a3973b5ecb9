from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from petal.kernels.cpu import build as native

PETAL_NATIVE = {"native": "1", "portable": "portable", "torch": "0"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test computes; `pytest -m cuda` runs those of a GPU alone."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@contextmanager
def fresh_kernels() -> Iterator[None]:
    """Kernels are built anew inside, for what the environment says there, and forgotten afterwards."""
    native.compiled.cache_clear()
    try:
        yield
    finally:
        native.compiled.cache_clear()


@pytest.fixture(params=["native", "torch"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the native kernels and with the torch backend, which stands in for them.

    Where the processor has a matrix unit, "portable" is something else than "native".
    """
    monkeypatch.setenv("PETAL_NATIVE", PETAL_NATIVE[request.param])
    with fresh_kernels():
        if request.param != "torch" and native.compiled() is None:
            pytest.skip("no C compiler")
        yield request.param
