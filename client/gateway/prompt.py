"""A request's prompt as a model reads it, and how what the model answers is to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...protocol.checkpoint.tokenizer import Tokenizer
from ..generation import Generator
from .errors import bad_request
from .generation_request import Conversation
from .parsing.formats import HARMONY_SIGNS, SILENT_MARKS, call_format, is_harmony, reasoning_format
from .parsing.harmony import HARMONY_MARKS, HarmonyParser
from .parsing.parser import MarkParser, Parser, PlainParser
from .told_tools import told

# Of a prompt's end, to see whether the template has opened reasoning.
_TAIL_IDS = 16


@dataclass(frozen=True)
class Prompt:
    """`visible`: special tokens that the parser must see."""

    ids: Sequence[int]
    parser: Callable[[], Parser] = PlainParser
    visible: frozenset[int] = frozenset()
    one_call: bool = False


def read_prompt(generator: Generator, prompt: Conversation | str | Sequence[int]) -> Prompt:
    """Raises ApiError, SettingsError, ChatTemplateError."""
    if not isinstance(prompt, Conversation):
        return Prompt(generator.encode(prompt))
    tokenizer = generator.tokenizer
    if tokenizer is None:
        raise bad_request(f"messages need a tokenizer, give token ids: {generator.lack}")
    template = tokenizer.chat_template or ""
    ids = _encode(tokenizer, prompt, template)
    if is_harmony(template):
        return Prompt(ids, HarmonyParser, _special(tokenizer, (*HARMONY_SIGNS, *HARMONY_MARKS)), prompt.one_call)
    calls = call_format(template) if prompt.tools else None
    reasoning = reasoning_format(template)
    if calls is None and reasoning is None:
        return Prompt(ids)
    marks = [*((*calls.opens, calls.closes, *SILENT_MARKS) if calls else ())]
    marks += [reasoning.opens, reasoning.closes] if reasoning else []
    tail = tokenizer.decode(ids[-_TAIL_IDS:], skip_special=False).rstrip()
    reasons = reasoning is not None and tail.endswith(reasoning.opens.rstrip())
    is_text = text_arguments(prompt.tools)
    return Prompt(
        ids, lambda: MarkParser(calls, reasoning, is_text, reasons), _special(tokenizer, marks), prompt.one_call
    )


def _encode(tokenizer: Tokenizer, prompt: Conversation, template: str) -> list[int]:
    variables, messages = dict(prompt.variables), prompt.messages
    if "tools" in template:
        variables |= {"tools": [*prompt.tools]} if prompt.tools else {}
    elif prompt.tools or any(message["role"] == "tool" for message in messages):
        messages = told(messages, prompt.tools)
    if prompt.goes_on:
        return _without_end(tokenizer, messages, variables)
    return tokenizer.apply_chat_template(messages, **variables)


def _without_end(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    """Up to the end of the last message's words, whatever the template writes behind them."""
    text = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
    last = str(messages[-1]["content"]).rstrip()
    at = text.rfind(last)
    if at < 0 or not last:
        raise bad_request("the chat template does not let the last message go on", "messages")
    return tokenizer.encode(text[: at + len(last)], add_special=False)


def text_arguments(tools: Sequence[Mapping[str, Any]]) -> Callable[[str, str], bool]:
    """Whether an argument of a tool is text, by the tools' schemas."""

    def properties(tool: Mapping[str, Any]) -> Mapping[str, Any]:
        function = tool.get("function", {})
        schema = function.get("parameters") if isinstance(function, Mapping) else None
        found = schema.get("properties") if isinstance(schema, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    types = {
        (str(tool.get("function", {}).get("name")), str(name)): schema.get("type")
        for tool in tools
        for name, schema in properties(tool).items()
        if isinstance(schema, Mapping)
    }
    return lambda tool, argument: types.get((tool, argument)) == "string"


def _special(tokenizer: Tokenizer, marks: Sequence[str]) -> frozenset[int]:
    """Special tokens that are part of a mark."""
    texts = {id: tokenizer.decode([id], skip_special=False) for id in tokenizer.special_ids}
    return frozenset(id for id, text in texts.items() if text and any(text in mark for mark in marks))
