"""What a text must follow, and what its scores are shifted by, as callers say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..protocol.grammar.grammar import GrammarError, json_grammar, lark_grammar, library_version, regex_grammar
from .arguments import SettingsError

GRAMMAR_KINDS = {"json_schema": json_grammar, "regex": regex_grammar, "grammar": lark_grammar}


def grammar_of(kind: str, given: Any) -> str:
    """The grammar's text. Raises SettingsError, also where llguidance is missing."""
    if kind != "json_schema" and not isinstance(given, str):
        raise SettingsError(f"{kind} is a text, not {given!r:.60}")
    try:
        library_version()
        return GRAMMAR_KINDS[kind](given)
    except ImportError:
        raise SettingsError(f"{kind} needs one more package: pip install 'petal-swarm[gateway]'") from None
    except GrammarError as error:
        raise SettingsError(f"{kind}: {error}") from None


def biases(given: Mapping[Any, Any]) -> tuple[tuple[int, float], ...]:
    """By token id, as peers are told of them. Raises SettingsError."""
    try:
        return tuple(sorted((int(id), float(np.float32(bias))) for id, bias in given.items()))
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise SettingsError("logit_bias maps token ids to numbers") from None
