"""How a chat template frames turns, as token ids: what a model must be fed so that it writes both sides of a chat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...protocol.checkpoint.tokenizer import Tokenizer
from ...protocol.checkpoint.tokenizer_chat import ChatTemplateError
from .shape import DistillError

_FREE = -1
USER, ASSISTANT = 0, 1
_WORDS = ("UserWordsOne", "AssistantWords", "UserWordsTwo")


@dataclass(frozen=True)
class Turns:
    """Ids before the user's first words, between user and assistant, and back; `end_ids` end any turn."""

    opening: tuple[int, ...]
    to_assistant: tuple[int, ...]
    to_user: tuple[int, ...]
    end_ids: frozenset[int]


def turns_of(tokenizer: Tokenizer, model: str) -> Turns:
    """Read the frame off rendered chats. Raises DistillError where there is no template or it hides the words."""
    first, answer, second = _WORDS
    chat = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    try:
        prompt = tokenizer.render_chat(chat[:1])
        whole = tokenizer.render_chat(chat)
    except ChatTemplateError as error:
        raise DistillError(f"{model} cannot write dialogues, {error} Give text with --data instead.") from error
    opening, found, to_assistant = prompt.partition(first)
    _, shown, rest = whole.partition(answer)
    to_user, again, _ = rest.partition(second)
    if not (found and shown and again and to_assistant and to_user):
        raise DistillError(f"the chat template of {model} changes what is said: give text with --data instead.")
    before, between, back = (
        tuple(tokenizer.encode(text, add_special=False)) for text in (opening, to_assistant, to_user)
    )
    return Turns(before, between, back, tokenizer.eos_ids)


class TurnKeeper:
    """Follows many dialogues at once: says which token each row gets next, and who speaks.

    A row is fed the frame's ids; between them it speaks freely until it ends its turn.
    """

    def __init__(self, turns: Turns, rows: int, vocab: int, device: torch.device) -> None:
        script, starts = [*turns.opening, _FREE], []
        for piece in (turns.to_assistant, turns.to_user):
            starts.append(len(script))
            script += [*piece, _FREE]
        self._script = torch.tensor(script, device=device)
        self._starts = torch.tensor(starts, device=device)
        self._stops = torch.zeros(2, vocab, dtype=torch.bool, device=device)
        self._stops[:, sorted(turns.end_ids)] = True
        self._stops[USER, turns.to_assistant[0]] = True
        self._stops[ASSISTANT, turns.to_user[0]] = True
        self._at = torch.zeros(rows, dtype=torch.long, device=device)
        self.speaker = torch.full((rows,), USER, device=device)
        self.begins = torch.ones(rows, dtype=torch.bool, device=device)  # the turn has no word yet

    def advance(self, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens drawn by the model [rows] -> tokens that count, which of them are the assistant's own, turns ended."""
        fed = self._script[self._at]
        free = fed == _FREE
        own = free & (self.speaker == ASSISTANT)
        ended = free & self._stops[self.speaker, drawn]
        self._at = torch.where(ended, self._starts[self.speaker], self._at)
        token = torch.where(free & ~ended, drawn, self._script[self._at])
        self._at += (ended | ~free).long()
        self.speaker = torch.where(ended, 1 - self.speaker, self.speaker)
        self.begins = ended | (self.begins & ~free)
        return token, own, ended
