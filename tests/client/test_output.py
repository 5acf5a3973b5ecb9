"""Where an answer stops: at a token, at a text, and what of it is said."""

from __future__ import annotations

import pytest
from petal.client.config import GenerationConfig
from petal.client.output import OutputChunk, OutputCutter
from petal.client.session.result import StepResult
from petal.protocol.checkpoint.tokenizer import Specials, Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

# Bytes as Llama 2 has them: a newline is a byte, too.
WORDS = ["<unk>", "<s>", "</s>", "<|im_end|>", "▁the", "▁cat", "<think>"]
BYTES = {byte: len(WORDS) + byte for byte in range(256)}
THE, CAT, END, THINK, NEWLINE = 4, 5, 3, 6, BYTES[10]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    names = [*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE({name: id for id, name in enumerate(names)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    backend.add_tokens(["<think>"])
    return Tokenizer(backend, Specials())


def answer(tokenizer: Tokenizer, ids: list[int], stops: str | list[str], at_once: bool = False) -> OutputChunk:
    """What is said of `ids`, which come one by one or all in one piece, until a stop."""
    cutter = OutputCutter(tokenizer, len(ids), (), GenerationConfig(stop_strings=stops).stops)
    whole = OutputChunk([])
    for part in [ids] if at_once else [[id] for id in ids]:
        piece = cutter.take(part, StepResult())
        whole.ids += piece.ids
        whole.text += piece.text
        whole.finish_reason = piece.finish_reason
        if piece.finish_reason:
            break
    return whole


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("ids", "stops", "kept", "text", "reason"),
    [
        ([THE, CAT, THE], " cat", 2, " the", "stop_string"),
        ([THE, CAT, THE], ["x", "at t"], 3, " the c", "stop_string"),
        ([THE, CAT, THE], "dog", 3, " the cat the", "length"),
        # The text of a special token is in no text: it works as its id.
        ([THE, END, CAT], "<|im_end|>", 2, " the", "stop"),
        ([THE, END, CAT], ["dog", "</s>", "<|im_end|>"], 2, " the", "stop"),
        ([THE, END, CAT], "</s>", 3, " the cat", "length"),
        # Added tokens that are not special are text.
        ([THE, THINK, CAT], "<think>", 2, " the", "stop_string"),
        ([THE, THINK, CAT], "think", 2, " the<", "stop_string"),
        # A byte's text may still change, but not where the answer ends.
        ([THE, NEWLINE, CAT], "\n", 2, " the", "stop_string"),
        ([THE, NEWLINE, NEWLINE, CAT], "\n\n", 3, " the", "stop_string"),
        ([THE, *(BYTES[byte] for byte in "é中".encode()), CAT], "中", 6, " theé", "stop_string"),
    ],
)
def test_stops(tokenizer: Tokenizer, ids, stops, kept, text, reason, at_once: bool):
    found = answer(tokenizer, ids, stops, at_once)
    assert (found.ids, found.text, found.finish_reason) == (ids[:kept], text, reason)


@pytest.mark.parametrize("stops", ["", [""], ["end", ""]])
def test_an_empty_stop_string_is_refused(stops):
    with pytest.raises(ValueError, match="at least one character"):
        GenerationConfig(stop_strings=stops)
