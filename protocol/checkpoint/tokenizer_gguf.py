"""The tokenizer that a GGUF file's metadata describes: byte-level BPE ("gpt2") or sentencepiece BPE ("llama").

Own code: transformers has such a conversion, but needs torch, and a client runs without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from .layout import CheckpointError
from .tokenizer import Specials, Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut before merging, by `tokenizer.ggml.pre`; "gpt-2" is the byte-level cutter's own rule.
_CUTS = {
    "default": "gpt-2",
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "qwen2": _WORDS % "",
    "deepseek-r1-qwen": _WORDS % "",
    "llama-bpe": _WORDS % "{1,3}",
    "llama3": _WORDS % "{1,3}",
    "llama-v3": _WORDS % "{1,3}",
}
_LLAMA3 = {"llama-bpe", "llama3", "llama-v3"}
_QWEN = {"qwen2", "deepseek-r1-qwen"}
# Files name one end token; chat models end a turn with another, known by its text.
_TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>"}


def gguf_tokenizer(metadata: Mapping[str, Any], model: str) -> Tokenizer:
    """Build the tokenizer; raises CheckpointError if its kind is unknown or its tables are broken."""
    fields = _Fields(metadata, model)
    kind = fields.text("model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{model}: the tokenizer {kind!r} is unknown: gpt2 and llama can be read.")
    tokens = fields.tokens()
    gemma = str(metadata.get("general.architecture")).startswith("gemma")
    if gemma:
        # The converter wrote these with the spaces that they stand for.
        tokens = ["▁" * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens]
    backend = _byte_level(fields, tokens) if kind == "gpt2" else _sentencepiece(fields, tokens, gemma)
    special, plain = _added(fields, tokens)
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    specials = _specials(fields, tokens, {token.content for token in special})
    _add_ends(backend, fields, tokens, kind)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, specials, template if isinstance(template, str) else None)


class _Fields:
    """`tokenizer.ggml.*`, with types checked."""

    def __init__(self, metadata: Mapping[str, Any], model: str) -> None:
        self._metadata, self.model = metadata, model

    def get(self, key: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str | None = None) -> str:
        value = default if (found := self.get(key)) is None else found
        if not isinstance(value, str):
            raise self.wrong(f"{key} is missing")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return value if isinstance(value, bool) else default

    def tokens(self) -> list[str]:
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise self.wrong("tokens must be a list of different texts")
        if len(set(tokens)) != len(tokens):
            twice = next(token for token, times in Counter(tokens).items() if times > 1)
            raise self.wrong(f"tokens must be a list of different texts, {twice[:40]!r} comes twice")
        return tokens

    def numbers(self, key: str, length: int) -> list[Any]:
        values = self.get(key)
        if not isinstance(values, np.ndarray) or len(values) != length or not np.isfinite(values).all():
            raise self.wrong(f"{key} must be {length} numbers")
        return list(values.tolist())

    def role(self, role: str, tokens: list[str]) -> int | None:
        """The id of a role such as "bos", None if the file names none."""
        value = self.get(f"{role}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.model}: its tokenizer is broken, {what}: download it again.")


def _byte_level(fields: _Fields, tokens: list[str]) -> Backend:
    pre = fields.text("pre", "default")
    if pre not in _CUTS:
        raise CheckpointError(f"{fields.model}: the tokenizer cut {pre!r} is unknown: {', '.join(_CUTS)} can be read.")
    vocab = {token: id for id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, _stored_merges(fields, vocab), ignore_merges=pre in _LLAMA3))
    backend.pre_tokenizer = _cutter(_CUTS[pre], fields.flag("add_space_prefix", False))
    backend.decoder = decoders.ByteLevel()
    if pre in _QWEN:
        backend.normalizer = normalizers.NFC()
    return backend


def _cutter(cut: str, prefix: bool) -> pre_tokenizers.PreTokenizer:
    if cut == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if cut == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=prefix)])
    words = pre_tokenizers.Split(Regex(cut), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)])


def _stored_merges(fields: _Fields, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    stored = fields.get("merges")
    if not isinstance(stored, list):
        raise fields.wrong("merges are missing")
    merges = []
    for merge in stored:
        left, _, right = merge.partition(" ")
        # The library cannot be trusted to refuse these itself.
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise fields.wrong(f"the merge {merge[:40]!r} is not made of tokens")
        merges.append((left, right))
    return merges


def _sentencepiece(fields: _Fields, tokens: list[str], in_order: bool) -> Backend:
    vocab = {token: id for id, token in enumerate(tokens)}
    unknown = fields.role("unknown", tokens)
    merges = _scored_merges(fields, tokens, vocab, in_order)
    unknown_token = None if unknown is None else tokens[unknown]
    backend = Backend(models.BPE(vocab, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))
    prefix = fields.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _scored_merges(
    fields: _Fields, tokens: list[str], vocab: Mapping[str, int], in_order: bool
) -> list[tuple[str, str]]:
    """Merges in transformers' order: best score of the result first, then the longest parts.

    `in_order`: tokens come by merit, whatever their scores, as Gemma's do.
    """
    scores = fields.numbers("scores", len(tokens))
    kinds = fields.numbers("token_type", len(tokens))
    ranked = []
    for id, token in enumerate(tokens):
        if kinds[id] in (_UNKNOWN, _CONTROL):
            continue
        rank = id if in_order else -scores[id]
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((rank, -cut, cut - len(token), id, left, right))
    return [(tokens[left], tokens[right]) for *_, left, right in sorted(ranked)]


def _added(fields: _Fields, tokens: list[str]) -> tuple[list[AddedToken], list[AddedToken]]:
    """Tokens that are matched before anything else: (special, plain)."""
    kinds = fields.numbers("token_type", len(tokens))

    typed = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if token]

    def of(wanted: int) -> list[AddedToken]:
        return [AddedToken(token, normalized=False) for token, kind in typed if kind == wanted]

    # Runs of "▁" are merged from spaces: in a text as it is typed, they would be matched before these are.
    return of(_CONTROL), [token for token in of(_USER_DEFINED) if token.content.strip("▁")]


def _specials(fields: _Fields, tokens: list[str], control: set[str]) -> Specials:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {name: tokens[id] for name, role in roles.items() if (id := fields.role(role, tokens)) is not None}
    ends = {id for role in ("eos", "eot", "eom") if (id := fields.role(role, tokens)) is not None}
    turn_ends = _TURN_ENDS & control
    ends |= {id for id, token in enumerate(tokens) if token in turn_ends}
    return Specials(fields.role("bos", tokens), frozenset(ends), named)


def _add_ends(backend: Backend, fields: _Fields, tokens: list[str], kind: str) -> None:
    """Have `encode` put the first and last token where the model wants them."""
    by_default = kind == "llama" or fields.get("pre") in _LLAMA3
    bos = fields.role("bos", tokens) if fields.flag("add_bos_token", by_default) else None
    eos = fields.role("eos", tokens) if fields.flag("add_eos_token", False) else None
    # Under names of their own, as a token's text could read as template syntax.
    names = {"<first>": bos, "<last>": eos}
    around = [{"id": name, "ids": [id], "tokens": [tokens[id]]} for name, id in names.items() if id is not None]
    if not around:
        return
    first = [] if bos is None else ["<first>"]
    last = [] if eos is None else ["<last>"]
    backend.post_processor = processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=around)
