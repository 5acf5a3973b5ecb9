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
    speaks = False


@dataclass(frozen=True)
class Text:
    """What `choice` gained by `count` tokens; `tokens` are these, where they were asked for.

    Text that may turn out to be part of something else is held back: it may be empty.
    """

    choice: int
    text: str
    count: int
    tokens: tuple[ScoredToken, ...] = ()

    @property
    def speaks(self) -> bool:
        return bool(self.text or self.tokens)


@dataclass(frozen=True)
class Finish:
    """`choice` is complete: by `stop`, a stop string, where one was met."""

    choice: int
    reason: FinishReason
    stop: str | None = None
    speaks = True


Event = Begin | Text | Finish


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    count: int = 0
    tokens: list[ScoredToken] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, event: Text | Finish) -> None:
        if isinstance(event, Finish):
            self.finish = event
        else:
            self.text += event.text
            self.count += event.count
            self.tokens += event.tokens


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
