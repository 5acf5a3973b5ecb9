"""What an answer consists of as it comes, for every API alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ScoredToken:
    """A token's text, and its log-probability under the model before temperature and cut-offs."""

    id: int
    text: str
    logprob: float
    top: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class Begin:
    """A prompt of so many tokens, of which `cached` need not be computed again; one for each prompt."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Tokens:
    """`choice` gained so many tokens; what they say comes with other events, or later. `scored`: where asked for."""

    choice: int
    count: int
    scored: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class Text:
    """Text that `choice` gained."""

    choice: int
    text: str


@dataclass(frozen=True)
class Reasoning:
    """What `choice` thinks, as far as the model marks it."""

    choice: int
    text: str


@dataclass(frozen=True)
class CallBegin:
    """The next call of a tool in `choice`; `call` counts them from 0."""

    choice: int
    call: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments: a piece of a JSON text."""

    choice: int
    call: int
    text: str


@dataclass(frozen=True)
class Finish:
    """`choice` is complete: by `stop`, a stop string, where one was met."""

    choice: int
    reason: FinishReason
    stop: str | None = None


Said = Text | Reasoning | CallBegin | CallArguments
Event = Begin | Tokens | Said | Finish


@dataclass
class Call:
    """A call of a tool so far."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    count: int = 0
    tokens: list[ScoredToken] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, event: Tokens | Said | Finish) -> None:
        if isinstance(event, Tokens):
            self.count += event.count
            self.tokens += event.scored
        elif isinstance(event, Text):
            self.text += event.text
        elif isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, CallBegin):
            self.calls.append(Call(event.id, event.name))
        elif isinstance(event, CallArguments):
            self.calls[event.call].arguments += event.text
        else:
            self.finish = event


@dataclass
class Answer:
    """All that came of one request so far."""

    choices: list[Choice]
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @classmethod
    def of(cls, choices: int) -> Answer:
        return cls([Choice() for _ in range(choices)])

    @property
    def completion_tokens(self) -> int:
        return sum(choice.count for choice in self.choices)

    @property
    def tokens(self) -> int:
        """All that had to be computed."""
        return self.prompt_tokens - self.cached_tokens + self.completion_tokens

    def add(self, event: Event) -> None:
        if isinstance(event, Begin):
            self.prompt_tokens += event.prompt_tokens
            self.cached_tokens += event.cached_tokens
        else:
            self.choices[event.choice].add(event)
