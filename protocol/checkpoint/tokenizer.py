"""Text to token ids and back, the same on every machine: the `tokenizers` library and a sandboxed chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so at most 3 stand unfinished at the end of a text.
_UNFINISHED = 3
_BYTE = re.compile("<0x[0-9a-fA-F]{2}>")


@dataclass(frozen=True)
class Specials:
    """Tokens with a role. `named` has their text by role ("bos_token", "eos_token", ...) for the chat template."""

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    named: Mapping[str, str] = field(default_factory=dict)


class Tokenizer:
    """A model's tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, specials: Specials, chat_template: str | None = None) -> None:
        self._backend = backend
        self.bos_id, self.eos_ids, self._named = specials.bos_id, specials.eos_ids, specials.named
        self.chat_template = chat_template

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds what the model wants around a text, such as a first token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids out of range vanish."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def detokenizer(self, skip_special: bool = True, visible: Collection[int] = ()) -> Detokenizer:
        """A decoder for one stream of ids; `visible` special ids are text whatever `skip_special` says."""
        return Detokenizer(self, skip_special, visible)

    def render_chat(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat as text; `variables`, such as tools, reach the template. Raises ChatTemplateError."""
        # Jinja is slow to import, and plain prompts do without.
        from .tokenizer_chat import render_chat

        values = {**self._named, **variables, "add_generation_prompt": add_generation_prompt}
        return render_chat(self.chat_template, messages, values)

    def apply_chat_template(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The chat as token ids; the template itself writes the special tokens. Raises ChatTemplateError."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special=False)

    def files(self) -> dict[str, str]:
        """What a model folder says of its tokenizer, by file name."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._named}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        return {"tokenizer.json": self._backend.to_str(), "tokenizer_config.json": json.dumps(settings, indent=1)}

    def token_id(self, token: str) -> int | None:
        """Id of one exact token, None if there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def is_silent(self, id: int, skip_special: bool = True) -> bool:
        """Whether `decode` leaves `id` out, as if it were not there."""
        return self._backend.id_to_token(id) is None or (skip_special and id in self.special_ids)

    def is_byte(self, id: int) -> bool:
        """Whether `id` stands for one byte of a character that has no token, as "<0xE6>" does."""
        return self._has_bytes and _BYTE.fullmatch(self._backend.id_to_token(id) or "") is not None

    @cached_property
    def _has_bytes(self) -> bool:
        decoder = self._backend.decoder
        return decoder is not None and decoder.decode(["<0x61>"]) == "a"

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special` leaves out."""
        return frozenset(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def special_ids_of(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of the special tokens among `texts`."""
        return frozenset(id for text in texts if (id := self.token_id(text)) is not None) & self.special_ids

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def trained_size(self) -> int:
        """Number of tokens without those added later, which a model may have no rows for."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    @cached_property
    def vocab_digest(self) -> str:
        """blake2b-16 in hex over all tokens in order of id: equal where ids mean the same."""
        tokens = sorted((id, token) for token, id in self._backend.get_vocab(with_added_tokens=True).items())
        return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).hexdigest()


class Detokenizer:
    """Decodes a stream of ids piece by piece. The pieces joined are the text of all ids.

    Own code: `tokenizers.decoders.DecodeStream` raises where a later byte changes what earlier ones were decoded to.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, visible: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Ids that are left out never come as far as the library.
        self._silences, self._visible = skip_special, visible
        self._skip_special = skip_special and not visible
        self._window: list[int] = []
        self._sent = 0

    @property
    def pending(self) -> str:
        """What `flush` would give now: text that further ids may still change."""
        return self._decode(self._window)[self._sent :]

    def add(self, id: int) -> str:
        """The text that `id` completes; never part of a UTF-8 character."""
        if self._tokenizer.is_silent(id, self._silences and id not in self._visible):
            return ""
        self._window.append(id)
        # Bytes are decoded as one run, which one bad byte spoils as a whole: until it ends, none of it is certain.
        if self._tokenizer.is_byte(id):
            return ""
        text = self._decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        piece = self._take(text, max(len(whole), len(text) - _UNFINISHED))
        alone = self._decode([id])
        # Where a character ends with a token that is text by itself, that token is context enough for the next:
        # decoders look back one token at most.
        if len(whole) == len(text) and alone:
            self._window, self._sent = [id], len(alone)
        return piece

    def flush(self) -> str:
        """What is held back, at the end of the stream; starts afresh."""
        piece = self.pending
        self._window, self._sent = [], 0
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece
