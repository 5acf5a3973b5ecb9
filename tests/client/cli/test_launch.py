"""`petal launch` sets what each agent reads, starts it where it is installed, and else says how to install it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from petal.client.cli.launch import AGENTS, INSTALL

from ...support.commands import petal

URL = "http://127.0.0.1:8100"


@pytest.mark.parametrize("agent", AGENTS)
def test_agents_are_told_of_url_model_and_key(agent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = AGENTS[agent](URL, "some/model", "petal-key")
    said = json.dumps([plan.arguments, plan.environment])
    assert all(word in said for word in (URL, "some/model", "petal-key"))
    assert plan.program == agent


def test_an_agent_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert INSTALL["codex"] in petal("launch", "codex").line("petal")


def test_an_agent_is_started_with_what_stands_behind_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "aider"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    started: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda *call: started.append(call))
    assert petal("launch", "aider", "--model", "m", "--url", f"{URL}/", "--message", "Hi").code == 0
    [(path, arguments, environment)] = started
    assert path == str(program)
    assert arguments[1:] == ["--model", "openai/m", "--message", "Hi"]
    assert environment["OPENAI_API_BASE"] == f"{URL}/v1"
