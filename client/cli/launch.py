"""`petal launch`: start an agent that talks to a gateway, with the variables and arguments that it reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import typer

from .gateway import PORT

# What programs need that insist on a key, where the gateway asks for none.
NO_KEY = "petal"


@dataclass(frozen=True)
class Launch:
    """A program with its arguments, and what its environment must say."""

    program: str
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def claude(url: str, model: str, key: str) -> Launch:
    names = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")
    models = dict.fromkeys(names, model)
    return Launch("claude", (), {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": key, **models})


def codex(url: str, model: str, key: str) -> Launch:
    provider = {"name": "Petal", "base_url": f"{url}/v1", "wire_api": "responses", "env_key": "PETAL_API_KEY"}
    settings = {"model_provider": "petal", **{f"model_providers.petal.{name}": said for name, said in provider.items()}}
    options = [part for name, said in settings.items() for part in ("-c", f"{name}={json.dumps(said)}")]
    return Launch("codex", (*options, "-m", model), {"PETAL_API_KEY": key})


def aider(url: str, model: str, key: str) -> Launch:
    return Launch("aider", ("--model", f"openai/{model}"), {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": key})


def opencode(url: str, model: str, key: str) -> Launch:
    options = {"baseURL": f"{url}/v1", "apiKey": key}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "Petal", "options": options, "models": {model: {}}}
    config = {"provider": {"petal": provider}, "model": f"petal/{model}"}
    return Launch("opencode", (), {"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


Agent = Literal["aider", "claude", "codex", "opencode"]
AGENTS: Mapping[Agent, Callable[[str, str, str], Launch]] = {
    "aider": aider,
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
}
INSTALL: Mapping[Agent, str] = {
    "aider": "pip install aider-chat",
    "claude": "npm install -g @anthropic-ai/claude-code",
    "codex": "npm install -g @openai/codex",
    "opencode": "npm install -g opencode-ai",
}


def launch(
    context: typer.Context,
    agent: Annotated[Agent, typer.Argument(help="Which one; what stands behind it goes to it as it is.")],
    model: Annotated[str, typer.Option(help="As the gateway calls it.")] = "demo",
    url: Annotated[str, typer.Option(help="Of the gateway.")] = f"http://127.0.0.1:{PORT}",
    key: Annotated[str, typer.Option(envvar="PETAL_API_KEY", help="Where the gateway asks for one.")] = NO_KEY,
) -> None:
    """Start a coding agent on a gateway's model.

    petal launch codex --model demo -- exec "Say hello."
    """
    plan = AGENTS[agent](url.rstrip("/"), model, key)
    program = shutil.which(plan.program)
    if program is None:
        raise ValueError(f"{agent} is not installed: {INSTALL[agent]}")
    environment = {**os.environ, **plan.environment}
    os.execve(program, [program, *plan.arguments, *context.args], environment)
