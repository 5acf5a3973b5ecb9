"""What code that knows transformers gets: tensors where torch is installed, else arrays, which are much alike."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model_packages import import_beside_others

# transformers' conventions: of ids [1, n] and scores [1, vocab], which a criterion does not get, to scores, or a truth.
LogitsProcessor = Callable[[Any, Any], Any]
StoppingCriterion = Callable[[Any, Any], Any]


def tensor(values: Any) -> Any:
    """Of ids, or of an array."""
    torch = _torch()
    return torch.tensor(values) if torch else np.array(values)


def array(values: Any) -> NDArray[Any]:
    """Of such a tensor or array, wherever it is."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


@functools.cache
def _torch() -> Any:
    """Whole: while a drafter's thread imports it, half of it is there already, and whoever uses that may hang."""
    if importlib.util.find_spec("torch") is None:
        return None
    return import_beside_others(lambda: importlib.import_module("torch"))
