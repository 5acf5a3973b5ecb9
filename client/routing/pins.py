"""Digests of the weights that this user's clients have used, pinned on first use: one file a model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from ...protocol.paths import data_dir
from ...protocol.trust.private_file import write_private

log = logging.getLogger(__name__)
_MODEL = "model"


class Pins:
    """`digests` by part, as `weights_of` names them: what a swarm serves in their place later is not used."""

    def __init__(self, model: str) -> None:
        """Raises ValueError where the file is damaged."""
        self._model = model
        self._path = path_of(model)
        self.digests = self._read()

    @property
    def model_digest(self) -> bytes | None:
        """What the name stood for at first."""
        return bytes.fromhex(self.digests[_MODEL]) if _MODEL in self.digests else None

    def keep(self, model_digest: bytes, weights: Mapping[str, str]) -> None:
        """Pin what is not pinned yet."""
        news = {_MODEL: model_digest.hex(), **weights}
        if news.keys() <= self.digests.keys():
            return
        try:
            self.digests = {**news, **self._read()}  # another client may have written meanwhile
            write_private(self._path, json.dumps({"name": self._model, "digests": self.digests}).encode())
        except OSError as error:
            log.warning("the weights of %s are pinned for as long as this runs only: %s", self._model, error)

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._path.read_bytes())
            return {part: bytes.fromhex(digest).hex() for part, digest in found["digests"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{self._path} is damaged: restore or delete it; without it {self._model} is pinned anew"
            ) from None


def forget(model: str) -> bool:
    """Let the next use pin whatever weights the swarm serves by then; False where nothing was pinned."""
    path = path_of(model)
    pinned = path.exists()
    path.unlink(missing_ok=True)
    return pinned


def path_of(model: str) -> Path:
    """Where a model's pins are. Its name is anybody's text, and no file's."""
    return data_dir() / "pins" / f"{hashlib.sha256(model.encode()).hexdigest()[:32]}.json"
