"""Running a model's blocks, or what is around them. What is named here is all that clients may use of a peer's code."""

from .ends import Ends
from .hooks import Attend
from .load import load_ends, load_span
from .precision import DENSE, Holding, holding_of
from .span import LayerSpec, Span

__all__ = ["DENSE", "Attend", "Ends", "Holding", "LayerSpec", "Span", "holding_of", "load_ends", "load_span"]
