"""What `generate` takes and gives: one prompt or many: text, messages, ids, a tensor, or what a tokenizer returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import PetalError
from .arguments import SettingsError
from .generation import BYTES, NO_BYTES, Prompt
from .output import OutputChunk


@dataclass(frozen=True)
class Prompts:
    """`rows` without padding; `given` as they came, which is what results begin with. `like`: the tensor they were."""

    rows: Sequence[Prompt]
    given: Sequence[Prompt]
    single: bool = False
    like: Any = None

    @classmethod
    def of(cls, inputs: Any, mask: Any = None, pad: int | None = None) -> Prompts:
        """Text, messages, ids, a list of these, a tensor [batch, length], a mapping of input_ids and attention_mask.

        Without a mask, `pad` at either end of a tensor's rows is padding. Raises SettingsError for anything else.
        """
        if isinstance(inputs, str):
            return cls([inputs], [inputs], single=True)
        if isinstance(inputs, BYTES):
            raise SettingsError(NO_BYTES)
        if isinstance(inputs, Mapping):
            if "input_ids" not in inputs:
                raise SettingsError(
                    f"a mapping of prompts has input_ids, not {', '.join(map(str, inputs)) or 'nothing'}"
                )
            inputs, mask = inputs["input_ids"], inputs.get("attention_mask") if mask is None else mask
        like = inputs if type(inputs).__module__.partition(".")[0] == "torch" else None
        rows, single = _rows(inputs)
        if mask is None and (like is None or pad is None):
            return cls(rows, rows, single, like)
        if mask is None:
            return cls([_without(pad, row) for row in rows], rows, single, like)
        masks = _rows(mask)[0]
        if [*map(len, rows)] != [*map(len, masks)]:
            raise SettingsError("attention_mask has a number for each of input_ids")
        kept = [[id for id, counts in zip(*pair, strict=True) if counts] for pair in zip(rows, masks, strict=True)]
        return cls(kept, rows, single, like)

    def result(self, groups: Sequence[Sequence[list[OutputChunk] | PetalError]], pad: int) -> Any:
        """The answers of each prompt in the form in which prompts came; rows of a tensor are padded with `pad`."""
        pairs = zip(self.given, groups, strict=True)
        results: list[Any] = [_answer(prompt, chunks) for prompt, group in pairs for chunks in group]
        if self.like is not None:
            width = max(map(len, results))
            return self.like.new_tensor([[*row, *[pad] * (width - len(row))] for row in results])
        return results[0] if self.single and len(results) == 1 else results


def _rows(inputs: Any) -> tuple[list[Any], bool]:
    """Prompts, and whether there was just one, not in a list."""
    try:
        items = inputs.tolist() if hasattr(inputs, "tolist") else list(inputs)
    except TypeError:
        raise SettingsError(f"prompts are text, messages or token ids, not {inputs!r:.60}") from None
    if not items:
        raise SettingsError("there is no prompt")
    if not isinstance(items[0], str) and hasattr(items[0], "__index__"):
        return [[int(item) for item in items]], True
    if isinstance(items[0], Mapping):
        return [items], True
    return items, False


def _without(pad: Any, row: Sequence[int]) -> Sequence[int]:
    """Without padding at either end; a row of nothing else stays."""
    text = [place for place, id in enumerate(row) if id != pad]
    return row[text[0] : text[-1] + 1] if text else row


def _answer(prompt: Any, chunks: list[OutputChunk] | PetalError) -> str | list[int] | PetalError:
    if isinstance(chunks, PetalError):
        return chunks
    if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        return "".join(chunk.text for chunk in chunks)
    return [*prompt, *(token for chunk in chunks for token in chunk.ids)]
