"""Tokens that a model folder names beside tokenizer.json, as transformers finds them: roles and added tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from .json_files import Finder, read_json

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Those that every model may have come first, in this order, which decides on ids.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")


def tokenizer_settings(folder: Finder) -> dict[str, Any]:
    """tokenizer_config.json, with what older folders keep in files of their own. Raises CheckpointError."""
    settings = read_json(folder, "tokenizer_config.json") or {}
    if "added_tokens_decoder" not in settings:
        settings |= read_json(folder, "special_tokens_map.json") or {}
    return settings


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Text of special tokens by role: "bos_token", "eos_token", and whatever else a model names so."""
    extra = settings.get(_LISTS[0])
    own = {**settings, **extra} if isinstance(extra, dict) else settings
    roles = [*_ROLES, *(key for key in own if key.endswith("_token") and key not in _ROLES)]
    return {role: text for role in roles if (text := _text(own.get(role)))}


def add_tokens(backend: tokenizers.Tokenizer, folder: Finder, settings: Mapping[str, Any]) -> None:
    """Make `backend` know all that the folder names; ids follow its last in the order in which they are listed.

    Raises CheckpointError.
    """
    special = [*named_tokens(settings).values(), *_listed(settings)]
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    added = _numbered(folder, settings, special, known)
    backend.add_tokens(added)
    known |= {token.content: token.special for token in added}
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special if not known.get(text)])


def _numbered(
    folder: Finder, settings: Mapping[str, Any], special: Collection[str], known: Collection[str]
) -> list[AddedToken]:
    """Tokens that are listed with their ids, in order; an old list has no say in those that are `known`."""
    stored = settings.get("added_tokens_decoder")
    if isinstance(stored, dict):
        entries = {int(id): entry for id, entry in stored.items() if id.isdecimal() and len(id) < 10}
    else:
        older = read_json(folder, "added_tokens.json") or {}
        entries = {id: text for text, id in older.items() if isinstance(id, int) and text not in known}
    texts = {id: text for id in sorted(entries) if (text := _text(entries[id]))}
    return [_token(entries[id], text, text in special) for id, text in texts.items()]


def _listed(settings: Mapping[str, Any]) -> Iterator[str]:
    """Special tokens without a role."""
    for key in _LISTS:
        entries = settings.get(key)
        if isinstance(entries, list):
            yield from (text for entry in entries if (text := _text(entry)))


def _token(entry: Any, text: str, special: bool) -> AddedToken:
    flags = {"special": special, "normalized": not special}
    if isinstance(entry, dict):
        flags |= {name: entry[name] for name in _FLAGS if isinstance(entry.get(name), bool)}
    return AddedToken(text, **flags)


def _text(token: Any) -> str | None:
    """A token is written as text or as an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
