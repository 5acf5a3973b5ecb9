"""Which drafters serve a model: by name, by path, or as the caller made them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ...protocol.checkpoint.tokenizer import Tokenizer
from ..load_once import LoadOnce
from ..model_packages import are_installed, import_beside_others
from ..routing.route import Route
from .budget import BudgetController
from .drafter import Drafter, DrafterError
from .ngram import NgramDrafter
from .rounds import Speculation

log = logging.getLogger(__name__)

# "auto", "none", "ngram", "model", a checkpoint's path or hub id, several with commas between, or instances.
DrafterChoice = str | Drafter | Sequence[str | Drafter]

# How soon an automatic drafter that failed is tried again.
AGAIN_S = 60.0

# What petal-drafter brings, and a checkout has.
SHIPPED = Path(__file__).parent.parent / "drafters"


def shipped_drafter(model_digest: bytes) -> Path | None:
    """The drafter that Petal has for this model, if there is one and petal-drafter is installed."""
    try:
        registry = json.loads((SHIPPED / "registry.json").read_text())
    except FileNotFoundError:
        return None
    found = registry.get(model_digest.hex())
    return SHIPPED / found if found else None


def load_drafter(source: str, tokenizer: Tokenizer, device: str = "cpu") -> Drafter:
    """The draft model of a checkpoint (folder, GGUF file or hub id). Raises DrafterError where it does not fit."""
    try:
        return import_beside_others(_model_loader)(source, tokenizer, device)
    except ImportError as error:
        raise DrafterError(f"a draft model needs more packages: pip install 'petal-swarm[models]' ({error})") from error


def _model_loader() -> Callable[[str, Tokenizer, str], Drafter]:
    from .model import DraftModel, ModelDrafter

    return lambda source, tokenizer, device: ModelDrafter(DraftModel.load(source, tokenizer, device))


class DrafterRegistry:
    """The drafters of one target: each draft model is loaded once, each route has one budget that learns."""

    def __init__(self, tokenizer: Tokenizer | None, model_digest: bytes, device: str = "cpu") -> None:
        self._tokenizer, self._device = tokenizer, device
        self._digest = model_digest
        self._models: LoadOnce[Drafter] = LoadOnce()
        self._warned = False
        self._again_at = 0.0
        self._budgets: dict[tuple[str, ...], BudgetController] = {}

    async def speculation(self, choice: DrafterChoice, budget: int | None, route: Route) -> Speculation:
        """Drafting for one sequence; what was learned about a route serves all its sessions. Raises DrafterError."""
        drafters = await self.drafters(choice)
        key = (*(type(drafter).__name__ for drafter in drafters), *(stop.peer.peer_id for stop in route))
        return Speculation(drafters, self._budgets.setdefault(key, BudgetController()), budget)

    async def drafters(self, choice: DrafterChoice) -> list[Drafter]:
        """Fresh drafters for one sequence. Raises DrafterError for a model that does not fit.

        "auto" is `ngram`, joined by the drafter that Petal has for this model as soon as it is loaded.
        """
        if isinstance(choice, str):
            choice = [part.strip() for part in choice.split(",")]
        found: list[Drafter] = []
        for part in [choice] if isinstance(choice, Drafter) else choice:
            found += [part.fresh()] if isinstance(part, Drafter) else await self._named(part)
        return found

    async def _named(self, name: str) -> list[Drafter]:
        if name == "none":
            return []
        if name == "ngram":
            return [NgramDrafter()]
        default = shipped_drafter(self._digest)
        if name == "auto":
            return [NgramDrafter(), *self._once_loaded(default)]
        if name == "model":
            if default is None:
                raise DrafterError(
                    "there is no drafter for this model here: pip install 'petal-swarm[drafter]' brings that of the "
                    "demo's model, `petal distill` makes others"
                )
            name = str(default)
        return [(await self._models.get(name, self._load(name))).fresh()]

    def _once_loaded(self, default: Path | None) -> list[Drafter]:
        """The default drafter, if it is there by now: nobody waits for it, and where it fails one does without."""
        if default is None or self._tokenizer is None or not are_installed():
            return []
        load = self._models.start(str(default), self._load(str(default)))
        if load.done() and load.exception() and time.monotonic() >= self._again_at:
            self._warn(load.exception())
            self._again_at = time.monotonic() + AGAIN_S
            load = self._models.again(str(default), self._load(str(default)))
        if not load.done():
            return []
        return [] if load.exception() else [load.result().fresh()]

    def _warn(self, error: BaseException | None) -> None:
        if not self._warned:
            log.warning("drafting goes on without the model's own drafter: %s", error)
        self._warned = True

    def _load(self, source: str) -> Callable[[], Drafter]:
        if self._tokenizer is None:
            raise DrafterError("a draft model needs the model's tokenizer, to compare vocabularies")
        return partial(load_drafter, source, self._tokenizer, self._device)
