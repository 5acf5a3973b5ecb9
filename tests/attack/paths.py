"""Names that lead out of the folders they are for: of models, swarms, roots and shards."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import jwt
from petal.client.routing.pins import Pins
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.checkpoint.safetensors import SafetensorsFile
from petal.protocol.private.authority import Authority, folder_of
from petal.protocol.private.invites import InviteError, read_token

from tests.support.private_swarms import home
from tests.support.tiny import tiny_llama

from .tally import Tally

TRICKS = (
    "..",
    "../secret",
    "../../../../etc/passwd",
    "/etc/passwd",
    "~/secret",
    "./secret/../../secret",
    "org/../../secret",
    "org/..",
    "org//name",
    "org/.name",
    "org/name/",
    "org/name@..",
    "org/name@../../secret",
    "org/name@main/../../../secret",
    "org/name@/etc",
    "org\\..\\secret",
    "C:\\secret",
    "file:///etc/passwd",
    "%2e%2e/secret",
    "name\0/secret",
    "",
)


def trick_paths(tally: Tally, folder: Path, ours: Authority) -> None:
    """`folder` holds nothing that any of these names may open, make or change."""
    claims = jwt.decode(ours.invite("client", {}, 1, 600), options={"verify_signature": False})
    with home(folder / "home"):
        for trick in TRICKS:
            tally.refused("path as a model", lambda trick=trick: open_checkpoint(trick), CheckpointError)
            tally.refused("path as a swarm", lambda trick=trick: folder_of(trick), ValueError)
            token = jwt.encode({**claims, "root": trick}, ours.key.key, "ES256")
            tally.refused("path as a root in an invitation", lambda token=token: read_token(token), InviteError)
            shard = f"{trick}.safetensors"
            tally.refused("path as a shard", lambda shard=shard: _read_shard(folder, shard), CheckpointError)
            Pins(trick).keep(b"m", {})
        pinned = {path for path in (folder / "home").rglob("*") if path.is_file()}
        assert len(pinned) == len(TRICKS)
        for path in pinned:
            tally.count("path as a pinned name", path.parent != folder / "home" / "petal" / "pins")


def _read_shard(folder: Path, shard: str) -> None:
    """A model whose index says that its weights are elsewhere, where there are some."""
    model = folder / "indexed" / "model"
    if not model.exists():
        model.mkdir(parents=True)
        shutil.copy(tiny_llama() / "config.json", model)
        shutil.copy(tiny_llama() / "model.safetensors", folder / "indexed" / "secret.safetensors")
    with closing(SafetensorsFile(folder / "indexed" / "secret.safetensors")) as secret:
        weight_map = dict.fromkeys(secret.tensors, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(model) as checkpoint:
        checkpoint.read("model.embed_tokens.weight")
