"""transformers' arguments of `generate` in GenerationConfig's words; what cannot be honoured is refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from ..protocol.errors import PetalError

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

# Without effect on what comes back: a swarm caches, compiles and places as its peers do.
_NO_EFFECT = frozenset(
    {
        "_commit_hash", "_from_model_config", "_original_object_hash", "assistant_confidence_threshold",
        "assistant_early_exit", "assistant_lookbehind", "bos_token_id", "cache_config", "cache_implementation",
        "compile_config", "disable_compile", "is_assistant", "low_memory", "max_matching_ngram_size",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "prefill_chunk_size", "remove_invalid_values",
        "synced_gpus", "target_lookbehind", "token_type_ids", "transformers_version", "use_cache",
        "use_model_defaults",
    }
)  # fmt: skip

# They change scores, see score_rules; these values ask for nothing.
_RULES = (
    "bad_words_ids", "begin_suppress_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size", "sequence_bias",
    "suppress_tokens",
)  # fmt: skip

# What changes the answer, and the values that leave it as it is.
_CANNOT: dict[str, tuple[Any, ...]] = {
    name: neutral
    for names, neutral in (
        (("num_beam_groups",), (1,)),
        (("typical_p", "encoder_repetition_penalty", "guidance_scale"), (1, 1.0)),
        (("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha", "top_h"), (0, 0.0)),
        (("encoder_no_repeat_ngram_size",), (0,)),
        (("output_attentions", "output_hidden_states", "token_healing"), (False,)),
        (("watermarking_config", "constraints", "force_words_ids", "decoder_start_token_id"), ()),
        (("prefix_allowed_tokens_fn",), ()),
        (("inputs_embeds", "past_key_values", "position_ids", "negative_prompt_ids"), ()),
        (("negative_prompt_attention_mask", "assistant_model", "assistant_tokenizer"), ()),
        (("custom_generate", "dola_layers"), ()),
    )
    for name in names
}  # fmt: skip

_INSTEAD = {
    **dict.fromkeys(
        ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), "top_k, top_p and min_p cut off what is rare"
    ),
    "assistant_model": "name a draft model with drafter=",
    "inputs_embeds": "connect with local_ends=True, which sends embeddings and takes token ids",
    "num_beam_groups": "num_beams alone searches without groups",
    "prefix_allowed_tokens_fn": "a logits_processor can forbid tokens",
}


class SettingsError(PetalError, ValueError):
    """A setting that is unknown, out of its range, contradicts another, or cannot be honoured; the message names it."""


def honoured(settings: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """`settings` by the names in `known`, those of a `generation_config` among them. Raises SettingsError."""
    given = dict(settings)
    config = given.pop("generation_config", None)
    if config is not None:
        given = {**_of_config(config), **given}
    if given.get("max_new_tokens") is not None:
        given.pop("max_length", None)  # as in transformers, what is said of the answer counts
    lookup = given.pop("prompt_lookup_num_tokens", None)
    if lookup is not None:
        given.setdefault("drafter", "ngram")
        given.setdefault("budget", int(lookup))
    for name in [name for name in given if name not in known]:
        _refuse_unless_neutral(name, given.pop(name), known)
    return {name: value for name, value in given.items() if not _says_nothing(name, value)}


def _says_nothing(name: str, value: Any) -> bool:
    if name in _RULES:
        return value is None or value in (0, [], {}, ())
    return value is None and name != "seed"


def _refuse_unless_neutral(name: str, value: Any, known: Collection[str]) -> None:
    if name in _NO_EFFECT:
        return
    if name in _CANNOT:
        if value is None or any(type(value) is type(same) and value == same for same in _CANNOT[name]):
            return
        instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise SettingsError(f"{name}={value!r:.60} is not supported{instead}")
    near = difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {near[0]}?" if near else f": it knows {', '.join(sorted(known))}"
    raise SettingsError(f"generate has no argument {name}{meant}")


def _of_config(config: Any) -> dict[str, Any]:
    """What transformers' GenerationConfig, or ours, says beyond its defaults."""
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "said"):
        return dict(config.said())
    if not hasattr(config, "to_diff_dict"):
        raise SettingsError(f"generation_config is a GenerationConfig of transformers or Petal, not {config!r:.60}")
    found: dict[str, Any] = config.to_diff_dict()
    if not found.get("do_sample"):
        # There a temperature alone draws nothing.
        found = {name: value for name, value in found.items() if name not in _SAMPLING} | {"do_sample": False}
    return found
