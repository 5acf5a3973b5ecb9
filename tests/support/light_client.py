"""A client on a machine without what peers need: run by tests in a process of its own, with nothing heavy imported."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from typing import Any

PEERS_NEED = frozenset({"torch", "hivemind", "transformers", "safetensors", "uvloop", "triton"})
UNIX_ONLY = frozenset({"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty", "uvloop"})
PROMPT = "One, two, three, one, two, three, one, two,"
# What the client stands on; it finds its own way on any system.
LIBRARIES = (
    *("asyncio", "cryptography.hazmat.primitives.asymmetric.rsa", "cryptography.x509", "google.protobuf", "grpc.aio"),
    *("jinja2.sandbox", "jwt", "numpy", "platformdirs", "pydantic.main", "rich.progress", "rich.table", "tokenizers"),
    *("starlette.applications", "typer", "uvicorn", "uvicorn.protocols.http.h11_impl"),
)
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": -1}
SAMPLED = {**SETTINGS, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}


class _Without:
    """A finder of modules that finds all but some."""

    def __init__(self, finder: Any, names: frozenset[str]) -> None:
        self._finder, self._names = finder, names

    def find_spec(self, name: str, *more: Any) -> Any:
        return None if name.partition(".")[0] in self._names else self._finder.find_spec(name, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide(names: Iterable[str]) -> None:
    """From now on these packages are as if never installed; they must not be loaded yet."""
    hidden = frozenset(names)
    assert not hidden & sys.modules.keys()
    sys.meta_path[:] = [_Without(finder, hidden) for finder in sys.meta_path]


def converse(address: str) -> dict[str, Any]:
    """What a client gets of the demo model's peer at `address`, in every way it can ask."""
    from petal.client import ConnectError, SwarmModel
    from petal.client.drafting.drafter import DrafterError

    said: dict[str, Any] = {}
    with SwarmModel.connect("demo", [address], wait_s=20) as model:
        assert model.tokenizer is not None
        said["greedy"] = model.generate(PROMPT, drafter="none", **SETTINGS)
        pieces = list(model.stream(PROMPT, **SETTINGS))
        said["streamed"] = "".join(piece.text for piece in pieces)
        said["drafted"] = sum(piece.nodes for piece in pieces)
        said["ngram"] = model.generate(PROMPT, drafter="ngram", budget=4, **SETTINGS)
        said["sampled"] = model.generate(PROMPT, **SAMPLED)
        beams = model.generate(PROMPT, num_beams=3, return_dict_in_generate=True, output_scores=True, **SETTINGS)
        said["beams"] = [beams.sequences, [float(score) for score in beams.sequences_scores], len(beams.scores)]
        said["ids"] = model.generate(model.tokenizer.encode(PROMPT), **SETTINGS)
        talk = model.chat(system="You are brief.")
        said["chat"] = ["".join(piece.text for piece in talk.send(text, **SETTINGS)) for text in ("Hi!", "Why?")]
        talk.close()
        try:
            model.generate(PROMPT, drafter="some/drafter", **SETTINGS)
        except DrafterError as error:
            said["no drafter"] = str(error)
    try:
        SwarmModel.connect("demo", ["/ip4/127.0.0.1/tcp/1/p2p/QmNobody"])
    except ConnectError as error:
        said["no DHT"] = str(error)
    try:
        SwarmModel.connect("demo", [address], local_ends=True)
    except ConnectError as error:
        said["no head"] = str(error)
    said["loaded"] = sorted(PEERS_NEED & sys.modules.keys())
    return said


def import_elsewhere(platform: str, *modules: str) -> None:
    """Import `modules` as on another system: only what Petal itself imports is looked at."""
    for module in LIBRARIES:
        importlib.import_module(module)
    sys.modules.update(dict.fromkeys(UNIX_ONLY))  # type: ignore[arg-type]  # None forbids an import
    sys.platform = platform
    for module in modules:
        importlib.import_module(module)


if __name__ == "__main__":
    if sys.argv[1] == "converse":
        hide(PEERS_NEED)
        print(json.dumps(converse(sys.argv[2])))
    else:
        import_elsewhere(*sys.argv[2:])
