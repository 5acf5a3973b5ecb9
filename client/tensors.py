"""What code that knows transformers gets: tensors where this process has torch, else arrays, which are much alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# transformers' conventions: of ids [1, n] and scores [1, vocab], which a criterion does not get, to scores, or a truth.
LogitsProcessor = Callable[[Any, Any], Any]
StoppingCriterion = Callable[[Any, Any], Any]


def tensor(values: Any) -> Any:
    """Of ids, or of an array."""
    torch = sys.modules.get("torch")
    return torch.tensor(values) if torch else np.array(values)


def array(values: Any) -> NDArray[Any]:
    """Of such a tensor or array, wherever it is."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
