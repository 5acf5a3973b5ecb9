"""What a model's makers say of generation, in its config and in generation_config.json beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .layout import text_config

log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# These change the text, and nothing here does what they ask for.
_UNUSED = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "encoder_repetition_penalty", "epsilon_cutoff",
    "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale",
    "length_penalty", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "penalty_alpha",
    "sequence_bias", "stop_strings", "suppress_tokens", "top_h", "typical_p",
)  # fmt: skip
_NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, [], {})


@dataclass(frozen=True)
class GenerationDefaults:
    """`eos_ids` end a text. `sampling` holds settings by transformers' names, for where one samples."""

    eos_ids: frozenset[int] = frozenset()
    do_sample: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)
    pad_id: int | None = None


def generation_defaults(config: Mapping[str, Any], generation: Mapping[str, Any], model: str) -> GenerationDefaults:
    """Of a config and its generation_config.json, which goes first; logs what of it has no effect here."""
    sampling = {name: generation[name] for name in _SAMPLING if _is_number(generation.get(name))}
    if unused := [name for name in _UNUSED if generation.get(name) not in _NEUTRAL]:
        log.warning("%s asks for %s in its generation_config.json, which is not used", model, ", ".join(unused))
    eos_ids, pad = listed_eos_ids(config, generation), generation.get("pad_token_id", config.get("pad_token_id"))
    return GenerationDefaults(
        eos_ids, generation.get("do_sample") is True, sampling, pad if type(pad) is int and pad >= 0 else None
    )


def listed_eos_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end a text by the generation config, else by the config."""
    listed = generation.get("eos_token_id", text_config(config).get("eos_token_id"))
    ids = listed if isinstance(listed, list) else [listed]
    return frozenset(id for id in ids if type(id) is int and id >= 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
