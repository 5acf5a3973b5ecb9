"""A grammar's masks: which tokens may follow what was said, by llguidance. The same at the last stage and in drafts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.tokenizer import Tokenizer
from ..errors import PetalError
from ..wire.sampling import Floats, SamplingError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Of a grammar's text.
MOST_CHARACTERS = 256 << 10
FEATURE = "grammar"
# Work that one mask, and the grammar itself, may take; the same wherever it is done, so that all agree where it ends.
_COMPILE_FUEL, _MASK_FUEL, _SYMBOLS = 1_000_000, 200_000, 200_000
# As most people write JSON: without a choice, a small model cannot go on with white space for ever.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Mask = NDArray[np.bool_]


class GrammarError(PetalError, ValueError):
    """What is wrong with a grammar, or with a text that should follow it."""


def json_grammar(schema: Mapping[str, Any] | bool | str) -> str:
    """Of the JSON values that a schema allows. Raises GrammarError for what is no schema."""
    try:
        given = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(given, bool):
            given = {} if given else {"not": {}}
        if not isinstance(given, Mapping):
            raise GrammarError("a JSON schema is an object, or a text that holds one")
        return json.dumps({"grammars": [{"json_schema": {**given, "x-guidance": _JSON_STYLE}}]}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from None


def regex_grammar(regex: str) -> str:
    """Of the texts that a regular expression (Rust's syntax) matches as a whole."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def lark_grammar(grammar: str) -> str:
    """Of the texts that a grammar in Lark's notation derives."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(grammar)


def library_version() -> str:
    """Raises ImportError where there is no llguidance."""
    from llguidance import get_version

    return get_version().split()[0].rpartition("@")[2]


def feature_of(tokenizer: Tokenizer) -> str:
    """What peers say that mask alike: library and vocabulary. Raises ImportError."""
    return f"{FEATURE}/{library_version()}/{tokenizer.vocab_digest}"


class GrammarCompiler:
    """Makes matchers for one tokenizer. `vocab_size`: scores of the model, which may be more than there are tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Costs nothing until the first grammar."""
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    @classmethod
    def of_file(cls, tokenizer_json: str, eos_ids: Collection[int], vocab_size: int) -> GrammarCompiler:
        """Of a tokenizer.json's text."""
        import tokenizers

        from ..checkpoint.tokenizer import Specials

        backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        return cls(Tokenizer(backend, Specials(eos_ids=frozenset(eos_ids))), vocab_size)

    @cached_property
    def tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        eos = sorted(id for id in self.tokenizer.eos_ids if id < self.vocab_size)
        size = max(self.vocab_size, self.tokenizer.vocab_size)
        return LLTokenizer(self.tokenizer.files()["tokenizer.json"], n_vocab=size, eos_token=eos or None)

    def compile(self, grammar: str) -> GrammarMatcher:
        """At the beginning of the grammar. Raises GrammarError, also for what only takes too much work."""
        from llguidance import LLMatcher, LLParserLimits

        if len(grammar) > MOST_CHARACTERS:
            raise GrammarError(f"a grammar has at most {MOST_CHARACTERS} characters, not {len(grammar)}")
        limits = LLParserLimits(
            initial_lexer_fuel=_COMPILE_FUEL,
            step_lexer_fuel=_MASK_FUEL,
            max_grammar_size=_SYMBOLS,
            verbose_errors=False,
        )
        matcher = LLMatcher(self.tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_sentence(matcher))
        return GrammarMatcher(matcher, self.tokenizer.eos_ids, self.vocab_size)


class GrammarMatcher:
    """Where a text stands in a grammar. Behind the end of text, and of the grammar, nothing but its end is allowed."""

    def __init__(self, matcher: LLMatcher, eos_ids: Collection[int], vocab_size: int) -> None:
        self._start = matcher
        self._matcher = matcher.deep_copy()
        self._eos_ids = frozenset(eos_ids)
        self._vocab_size = vocab_size
        self._said: list[int] = []

    def fresh(self) -> GrammarMatcher:
        """Another one, at the beginning."""
        return GrammarMatcher(self._start, self._eos_ids, self._vocab_size)

    def allowed(self, said: Sequence[int]) -> Mask:
        """Tokens that may follow `said`, [vocab_size]. Raises GrammarError where `said` does not follow the grammar."""
        if not self._eos_ids.isdisjoint(said):
            return self._end_mask
        self._go_to(said)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        return mask if mask.any() else self._end_mask

    def follows(self, said: Sequence[int], more: Sequence[int]) -> int:
        """How many of the tokens `more` may follow `said`, one after the other. Raises GrammarError."""
        if not self._eos_ids.isdisjoint(said):
            return 0
        self._go_to(said)
        return int(self._matcher.validate_tokens(list(more)))

    @cached_property
    def _end_mask(self) -> Mask:
        mask = np.zeros(self._vocab_size, np.bool_)
        ends = [id for id in self._eos_ids if id < self._vocab_size]
        if not ends:
            raise GrammarError("the grammar is over, and this model has no token that ends a text")
        mask[ends] = True
        return mask

    def _go_to(self, said: Sequence[int]) -> None:
        """Back to what the text so far has in common with the last one, then on."""
        common = next((i for i, (a, b) in enumerate(zip(self._said, said, strict=False)) if a != b), None)
        if common is None:
            common = min(len(self._said), len(said))
        done = common == len(self._said) or self._matcher.rollback(len(self._said) - common)
        done = done and (common == len(said) or self._matcher.consume_tokens(list(said[common:])))
        self._said = list(said)
        self._check(done)

    def _check(self, done: bool = True) -> None:
        if not done or self._matcher.is_error():
            reason = _sentence(self._matcher)
            self._matcher, self._said = self._start.deep_copy(), []
            raise GrammarError(reason)


def masked(matcher: GrammarMatcher, prompt_length: int) -> Callable[[Sequence[int], Floats], Floats]:
    """The scores [vocab] of the token behind these ids, those that the grammar forbids at -inf. In place.

    It raises SamplingError where the text so far does not follow the grammar.
    """

    def mask(ids: Sequence[int], values: Floats) -> Floats:
        try:
            values[~matcher.allowed(ids[prompt_length:])] = -np.inf
        except GrammarError as error:
            raise SamplingError(str(error)) from None
        return values

    return mask


def _sentence(matcher: LLMatcher) -> str:
    reason = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    return f"the grammar cannot be followed: {reason[:300]}"
