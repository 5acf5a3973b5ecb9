"""Running a model's blocks, or what is around them. What is named here is all that clients may use of a peer's code."""

from .dense import read_dense
from .ends import Ends
from .load import load_ends, load_span
from .precision import DENSE, WeightPrecision, precision_of
from .span import Span

__all__ = ["DENSE", "Ends", "Span", "WeightPrecision", "load_ends", "load_span", "precision_of", "read_dense"]
