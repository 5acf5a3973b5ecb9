"""Reasoning and calls are found in every format, however a model's words are cut into pieces."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from petal.client.gateway.parsing.formats import CALL_FORMATS, PLAIN, CallFormat, call_format, reasoning_format
from petal.client.gateway.parsing.harmony import HarmonyParser
from petal.client.gateway.parsing.parser import MarkParser, Parser
from petal.client.gateway.parsing.part import Part, joined

FORMATS = {each.name: each for each in (*CALL_FORMATS, PLAIN)}
CITY = {"city": 'Pa"ris </tool_call>', "days": 3}
ARGUMENTS = json.dumps(CITY)
PLAIN_CITY = {"city": "Paris", "days": 3}

# What models write, and the arguments that are meant; two calls, the second without arguments where the format can.
WRITTEN: dict[str, tuple[str, list[tuple[str, dict[str, object]]]]] = {
    "hermes": (
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {}, "name": "time"}\n</tool_call>',
        [("weather", CITY), ("time", {})],
    ),
    "qwen-coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>",
        [("weather", PLAIN_CITY), ("time", {})],
    ),
    "glm": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>time\n</tool_call>",
        [("weather", PLAIN_CITY), ("time", {})],
    ),
    "deepseek-v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [("weather", CITY), ("time", {})],
    ),
    "deepseek-v3.1": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [("weather", CITY), ("time", {})],
    ),
    "mistral-v11": (
        f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}",
        [("weather", CITY), ("time", {})],
    ),
    "mistral": (
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}, "id": "x"}}, {{"name": "time"}}]',
        [("weather", CITY), ("time", {})],
    ),
    "gemma-4": (
        '<|tool_call>call:weather{city:<|"|>Pa"ris </tool_call><|"|>,days:3}<tool_call|>'
        "<|tool_call>call:time{}<tool_call|>",
        [("weather", CITY), ("time", {})],
    ),
    "function-gemma": (
        "<start_function_call>call:weather{city:<escape>Paris<escape>,days:3}<end_function_call>",
        [("weather", PLAIN_CITY)],
    ),
    "llama-3": (
        f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "time", "parameters": {{}}}}',
        [("weather", CITY), ("time", {})],
    ),
    "llama-3.2": (f'{{"name": "weather", "parameters": {ARGUMENTS}}}', [("weather", CITY)]),
}
WRITTEN["plain"] = WRITTEN["hermes"]


def said(parser: Parser, pieces: list[str]) -> list[Part]:
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return joined([*parts, *parser.close()])


def calls(parts: list[Part]) -> list[tuple[str, dict[str, object]]]:
    found: list[tuple[str, str]] = []
    for part in parts:
        if part.kind == "call":
            found.append((part.text, ""))
        elif part.kind == "arguments":
            found[-1] = (found[-1][0], found[-1][1] + part.text)
    return [(name, json.loads(arguments)) for name, arguments in found]


def parser_of(call: CallFormat) -> MarkParser:
    return MarkParser(call, None)


def cut(text: str, seed: int) -> list[str]:
    chance = random.Random(seed)
    places = sorted(chance.sample(range(len(text) + 1), min(len(text), chance.randint(0, 40))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_found_however_the_text_is_cut(name: str) -> None:
    text, expected = WRITTEN[name]
    whole = said(parser_of(FORMATS[name]), [text])
    assert calls(whole) == expected
    assert "".join(part.text for part in whole if part.kind == "text") in ("", "Let me see.")
    for seed in range(60):
        assert said(parser_of(FORMATS[name]), cut(text, seed)) == whole
    assert said(parser_of(FORMATS[name]), list(text)) == whole


def test_arguments_stream_as_they_come() -> None:
    text, _ = WRITTEN["hermes"]
    parser, seen = parser_of(FORMATS["hermes"]), []
    for at, character in enumerate(text):
        seen += [(at, part) for part in parser.feed(character) if part.kind == "arguments"]
    first, last = text.index('{"city"'), text.index("3}")
    assert seen[0][0] == first
    assert len([at for at, _ in seen if first <= at <= last]) > 30


@pytest.mark.parametrize(
    "text",
    ["Hello <tool_call", "a <tool_call>b", "<tool_call>no JSON</tool_call> and on", "{}", "x < y", "[TOOL_CALLS", "  "],
)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    for pieces in ([text], list(text)):
        parts = said(parser_of(FORMATS[name]), pieces)
        if not any(part.kind == "call" for part in parts):  # glm names a tool without any syntax
            assert "".join(part.text for part in parts) == text


def test_reasoning_is_told_apart() -> None:
    thinking = reasoning_format("... <think> ... </think>")
    text = "<think>\nFirst, <b>.\n</think>\n\nParis."
    for pieces in ([text], list(text), cut(text, 3)):
        parts = said(MarkParser(None, thinking), pieces)
        assert parts == [Part("reasoning", "First, <b>.\n"), Part("text", "Paris.")]
    # The template has opened it.
    opened = said(MarkParser(None, thinking, reasons=True), ["First.", "</thi", "nk>Paris."])
    assert opened == [Part("reasoning", "First."), Part("text", "Paris.")]
    unfinished = said(MarkParser(None, thinking, reasons=True), ["First.</thi"])
    assert unfinished == [Part("reasoning", "First.</thi")]


def test_harmony() -> None:
    text = (
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary "
        'to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
        "<|start|>assistant<|channel|>final<|message|>Sunny."
    )
    whole = said(HarmonyParser(), [text])
    assert whole == [
        Part("reasoning", "Need the weather."),
        Part("call", "weather"),
        Part("arguments", '{"city": "Paris"}'),
        Part("text", "Sunny."),
    ]
    for seed in range(40):
        assert said(HarmonyParser(), cut(text, seed)) == whole


PIECES = [
    "<tool_call>",
    "</tool_call>",
    '{"name": ',
    '"f"',
    ', "arguments": ',
    "{",
    "}",
    '"',
    "[",
    "]",
    "text",
    "\n",
    "\\",
]


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from([*PIECES, "<think>", "</think>", "[TOOL_CALLS]"])))
def test_any_text_is_parsed_the_same_however_it_is_cut(name: str, pieces: list[str]) -> None:
    def parser() -> MarkParser:
        return MarkParser(FORMATS[name], reasoning_format("<think></think>"))

    text = "".join(pieces)
    assert said(parser(), list(text)) == said(parser(), [text]) == said(parser(), pieces)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ tools }} <tool_call> <function=", "qwen-coder"),
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }} [TOOL_CALLS]", "mistral"),
        ("{{ tools }} nothing", "plain"),
        ("{{ messages }}", "plain"),
    ],
)
def test_formats_are_known_by_their_templates(template: str, name: str) -> None:
    assert call_format(template).name == name
