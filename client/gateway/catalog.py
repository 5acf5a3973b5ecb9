"""The models that a gateway serves, by the names that callers use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from http import HTTPStatus

from .errors import ApiError
from .served_model import ServedModel


class Catalog:
    """At least one model."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = list(models)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def find(self, name: str) -> ServedModel:
        """By the name its peers know, or the one that the gateway was started with. Raises ApiError."""
        # Ollama's clients add a tag.
        wanted = {name, name.removesuffix(":latest")}
        for model in self._models:
            if wanted & {model.name, model.alias}:
                return model
        names = ", ".join(model.name for model in self._models)
        message = f"there is no model {name[:80]!r} here; served: {names}"
        raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")
