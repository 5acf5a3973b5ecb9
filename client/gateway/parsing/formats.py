"""How models write reasoning and calls of tools: data, one entry a format, found by what a chat template mentions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .json_calls import JsonCalls
from .named_calls import GemmaCall, IsText, NamedJson, Pairs
from .part import CallReader

MakeReader = Callable[[IsText], CallReader]


@dataclass(frozen=True)
class CallFormat:
    """Calls between `opens` and `closes` (where something does). `signs`: all are in the template of who writes so.

    `bare`: a message that begins with a brace is a call, too.
    """

    name: str
    signs: tuple[str, ...]
    opens: tuple[str, ...]
    closes: str
    reader: MakeReader
    bare: bool = False


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning between two marks, the first of which a template may have written itself."""

    opens: str
    closes: str


def _json(is_text: IsText) -> CallReader:
    return JsonCalls()


def _named(before: str, after: str) -> MakeReader:
    return lambda is_text: NamedJson(before, after)


def _gemma(quote: str) -> MakeReader:
    return lambda is_text: GemmaCall(quote)


# The first whose signs are all there counts.
CALL_FORMATS: Sequence[CallFormat] = (
    CallFormat(
        "qwen-coder", ("<tool_call>", "<function="), ("<tool_call>",), "</tool_call>",
        partial(Pairs, ("<function=", ">"), ("<parameter=", ">"), ("", "</parameter>")),
    ),
    CallFormat(
        "glm", ("<tool_call>", "<arg_key>"), ("<tool_call>",), "</tool_call>",
        partial(Pairs, ("", "\n"), ("<arg_key>", "</arg_key>"), ("<arg_value>", "</arg_value>")),
    ),
    CallFormat("hermes", ("<tool_call>",), ("<tool_call>",), "</tool_call>", _json),
    CallFormat(
        "deepseek-v3", ("<｜tool▁call▁begin｜>", "```json"), ("<｜tool▁call▁begin｜>",), "\n```<｜tool▁call▁end｜>",
        _named("function<｜tool▁sep｜>", "\n```json\n"),
    ),
    CallFormat(
        "deepseek-v3.1", ("<｜tool▁call▁begin｜>",), ("<｜tool▁call▁begin｜>",), "<｜tool▁call▁end｜>",
        _named("", "<｜tool▁sep｜>"),
    ),
    CallFormat("mistral-v11", ("[TOOL_CALLS]", "[ARGS]"), ("[TOOL_CALLS]",), "", _named("", "[ARGS]")),
    CallFormat("mistral", ("[TOOL_CALLS]",), ("[TOOL_CALLS]",), "", _json),
    CallFormat("gemma-4", ("<|tool_call>",), ("<|tool_call>",), "<tool_call|>", _gemma('<|"|>')),
    CallFormat(
        "function-gemma", ("<start_function_call>",), ("<start_function_call>",), "<end_function_call>",
        _gemma("<escape>"),
    ),
    CallFormat("llama-3", ("<|python_tag|>",), ("<|python_tag|>",), "", _json, bare=True),
    CallFormat("llama-3.2", ('"parameters"',), ("<|python_tag|>",), "", _json, bare=True),
)  # fmt: skip

# Of templates that know no tools, see `told_tools`; it is what most open models were trained on.
PLAIN = CallFormat("plain", (), ("<tool_call>",), "</tool_call>", _json)

REASONING_FORMATS: Sequence[ReasoningFormat] = (
    ReasoningFormat("<think>", "</think>"),
    ReasoningFormat("[THINK]", "[/THINK]"),
    ReasoningFormat("<|channel>thought\n", "<channel|>"),
    ReasoningFormat("<seed:think>", "</seed:think>"),
)

# gpt-oss writes each part as a message of its own, with a header that says what it is.
HARMONY_SIGNS = ("<|channel|>", "<|message|>")
# Marks between messages and lists of calls, which say nothing beside the calls themselves.
SILENT_MARKS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")


def is_harmony(template: str) -> bool:
    return all(sign in template for sign in HARMONY_SIGNS)


def call_format(template: str) -> CallFormat:
    """How a model with this chat template writes calls."""
    found = (each for each in CALL_FORMATS if all(sign in template for sign in each.signs))
    return next(found, PLAIN) if "tools" in template else PLAIN


def reasoning_format(template: str) -> ReasoningFormat | None:
    """How a model with this chat template marks reasoning; None where it does not."""
    return next((each for each in REASONING_FORMATS if each.closes in template or each.opens in template), None)
