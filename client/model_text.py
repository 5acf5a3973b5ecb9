"""What a client knows of a model's text: its tokenizer, and what its makers say of generation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..protocol.checkpoint.checkpoint import Checkpoint
from ..protocol.checkpoint.generation_defaults import GenerationDefaults
from ..protocol.checkpoint.layout import CheckpointError
from ..protocol.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelText:
    """`lack` says why there is no tokenizer; token ids work without."""

    tokenizer: Tokenizer | None = None
    lack: str = ""
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: Tokenizer | None = None) -> ModelText:
        """With the checkpoint's own tokenizer unless another is given. Raises CheckpointError."""
        lack = ""
        if tokenizer is None:
            try:
                tokenizer = checkpoint.tokenizer()
            except CheckpointError as error:
                lack = str(error)
        defaults = checkpoint.generation_defaults()
        ends = tokenizer.eos_ids if tokenizer else frozenset()
        return cls(tokenizer, lack, replace(defaults, eos_ids=defaults.eos_ids | ends))
