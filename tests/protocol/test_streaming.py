"""Text that streams is the text of its ids, for tokenizers of every type, wherever a stream is cut."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petal.protocol.checkpoint.tokenizer import Specials, Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "the cat sat on the mat, don't they?",
    "Ünïcödé naïve café",
    "你好 世界",
    "a b  c   d\n\nef",
    "hello hello",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def _bpe_with_bytes(prefix: bool) -> Backend:
    """As Llama 2's (with `prefix`) or Gemma's: characters without a token fall back to bytes."""
    words = ["▁", "t", "h", "e", "a", "c", "s", "l", "o", "th", "the", "▁the", "▁c", "▁▁", "é", "\ufffd", "."]
    vocab = {token: id for id, token in enumerate([*SPECIAL, *BYTES, *words])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _unigram_with_bytes() -> Backend:
    pieces = [*((token, 0.0) for token in [*SPECIAL, *BYTES]), ("▁", -2.0), ("▁the", -1.0), ("cat", -1.5), ("e", -3.0)]
    backend = Backend(models.Unigram(pieces, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def _unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return backend


def _byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    return backend


def _word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL))
    return backend


def _word_ends() -> Backend:
    """As the first GPT's: a word's last token ends in "</w>"."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _words() -> Backend:
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return backend


MAKERS: dict[str, Callable[[], Backend]] = {
    "bytes, with a space in front": lambda: _bpe_with_bytes(True),
    "bytes": lambda: _bpe_with_bytes(False),
    "unigram with bytes": _unigram_with_bytes,
    "unigram": _unigram,
    "byte level": _byte_level,
    "word pieces": _word_piece,
    "word ends": _word_ends,
    "words": _words,
}
every_type = pytest.mark.parametrize("kind", MAKERS)
texts = st.text(
    st.one_of(st.sampled_from("the cat \n.'▁枵你😀é\ufffd\u200d"), st.characters(codec="utf-8")), max_size=30
)


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    backend = MAKERS[kind]()
    backend.add_special_tokens([token for token in SPECIAL if backend.token_to_id(token) is not None])
    backend.add_tokens(["<added>"])
    return Tokenizer(backend, Specials())


def check(kind: str, ids: list[int], skip: bool) -> None:
    """At every cut the pieces so far and what is pending are transformers' text of the ids so far."""
    ours = tokenizer(kind)
    stream, said = ours.detokenizer(skip), ""
    for cut, id in enumerate(ids, 1):
        piece = stream.add(id)
        said += piece
        assert said + stream.pending == ours._backend.decode(ids[:cut], skip_special_tokens=skip)
    assert said + stream.flush() == ours._backend.decode(ids, skip_special_tokens=skip)
    assert stream.flush() == ""


@every_type
@settings(max_examples=60, deadline=None)
@given(texts, st.booleans())
def test_texts_stream_as_they_decode(kind: str, text: str, skip: bool):
    check(kind, tokenizer(kind).encode(text), skip)


@every_type
@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_any_ids_stream_as_they_decode(kind: str, data: st.DataObject, skip: bool):
    # Two more than there are: what is no token says nothing.
    known = st.integers(0, tokenizer(kind).vocab_size + 1)
    check(kind, data.draw(st.lists(known, max_size=30)), skip)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "bytes" in kind])
def test_characters_of_bytes_side_by_side_stay_whole(kind: str):
    ours = tokenizer(kind)
    text = "枵" * 12
    ids = ours.encode(text + "e")
    stream = ours.detokenizer()
    pieces = [stream.add(id) for id in ids]
    assert "".join(pieces) == text + "e"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_long_text_of_split_characters_is_decoded_in_short_pieces(monkeypatch: pytest.MonkeyPatch):
    """Where no token is text by itself, a stream must not decode all that came before again and again."""
    ours = tokenizer("byte level")
    ids, longest = ours.encode("枵" * 200), 0
    decode = ours.decode

    def watched(ids: list[int], skip_special: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, skip_special)

    monkeypatch.setattr(ours, "decode", watched)
    stream = ours.detokenizer()
    assert "".join(map(stream.add, ids)) + stream.flush() == "枵" * 200
    assert longest <= 8
