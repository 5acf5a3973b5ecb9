"""The tokenizer of a model folder: tokenizer.json, with roles and chat template from the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers

from .generation_defaults import listed_eos_ids
from .json_files import Finder, read_json
from .layout import CheckpointError
from .tokenizer import Specials, Tokenizer
from .tokenizer_added import add_tokens, named_tokens, tokenizer_settings


def folder_tokenizer(folder: Finder, config: Mapping[str, Any]) -> Tokenizer:
    """Load the tokenizer; raises CheckpointError if tokenizer.json is missing or broken."""
    path = folder.find("tokenizer.json")
    if path is None:
        raise CheckpointError(f"{folder} has no tokenizer.json: save the model with a fast tokenizer.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    # The library raises bare Exception.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read, {error}: download it again.") from error
    backend.no_truncation()
    backend.no_padding()
    settings = tokenizer_settings(folder)
    add_tokens(backend, folder, settings)
    named = named_tokens(settings)
    bos = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
    eos_ids = listed_eos_ids(config, read_json(folder, "generation_config.json") or {})
    own = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    specials = Specials(bos, eos_ids if own is None else eos_ids | {own}, named)
    return Tokenizer(backend, specials, _chat_template(folder, settings))


def _chat_template(folder: Finder, settings: Mapping[str, Any]) -> str | None:
    path = folder.find("chat_template.jinja")
    if path is not None:
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read as UTF-8 text: download it again.") from error
    stored = (read_json(folder, "chat_template.json") or settings).get("chat_template")
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        stored = named.get("default")
    return stored if isinstance(stored, str) else None
