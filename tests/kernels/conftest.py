from collections.abc import Iterator

import pytest
from petal.kernels import attention, linear, native


@pytest.fixture(params=["native", "torch"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the native kernels and with the torch code that stands in for them."""
    caches = (native.library, linear._product, attention._attention)
    if request.param == "torch":
        monkeypatch.setenv("PETAL_NATIVE", "0")
    else:
        monkeypatch.delenv("PETAL_NATIVE", raising=False)
    for cache in caches:
        cache.cache_clear()
    if request.param == "native" and native.library() is None:
        pytest.skip("no C compiler")
    yield request.param
    for cache in caches:
        cache.cache_clear()
