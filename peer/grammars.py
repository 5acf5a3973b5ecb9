"""Whether this peer can keep texts to a grammar: it draws, has the model's tokenizer, and llguidance is there."""

from __future__ import annotations

from ..protocol.checkpoint.checkpoint import Checkpoint
from ..protocol.checkpoint.layout import CheckpointError
from ..protocol.grammar.checker import GrammarChecker
from ..protocol.grammar.grammar import GrammarCompiler, feature_of


def grammar_feature(checkpoint: Checkpoint, blocks: range) -> str:
    """What the record says of it; empty where this peer cannot."""
    if blocks.stop < checkpoint.n_blocks:
        return ""
    try:
        return feature_of(checkpoint.tokenizer())
    except (CheckpointError, ImportError):
        return ""


def grammar_checker(checkpoint: Checkpoint, blocks: range, vocab_size: int) -> GrammarChecker | None:
    """None where this peer cannot. Nothing is started before the first grammar comes."""
    if not grammar_feature(checkpoint, blocks):
        return None
    return GrammarChecker(GrammarCompiler(checkpoint.tokenizer(), vocab_size))
