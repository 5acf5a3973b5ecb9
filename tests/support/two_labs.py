"""Two labs with addresses of their own, and a third place that knows only where they are: run by test_two_labs.

Runs as root of new namespaces: `unshare --map-root-user --net --mount python -m tests.support.two_labs`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from petal.protocol.private.membership import Membership

from tests.support.tiny import tiny_llama

LABS = {"oxford": "10.77.0.1", "kyoto": "10.77.0.2", "elsewhere": "10.77.0.3"}
START_S = 120.0
CUT_S = 60.0
BIN = Path(sys.executable).parent
PROMPT = [1, 5, 9, 4, 77]
GENERATE = f"""
import json, sys
from petal.client import ConnectError, NoRoute, PeerError, SwarmModel
model, join, peers = json.loads(sys.argv[1])
try:
    with SwarmModel.connect(model, peers, join=join, wait_s=5) as swarm:
        print(json.dumps(swarm.generate({PROMPT}, max_new_tokens=8, eos_token_id=-1)))
except (ConnectError, NoRoute, PeerError) as error:
    sys.exit(f"refused: {{error}}")
"""


class Place:
    """One network namespace, with a home of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.address = name, LABS[name]
        self._environment = {**os.environ, "XDG_DATA_HOME": str(folder / name), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), env=self._environment, capture_output=True, text=True, timeout=START_S, check=False
        )

    def petal(self, *words: str) -> str:
        done = self.run(str(BIN / "petal"), *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def generate(self, model: str, join: str | None, peers: tuple[str, ...] = ()) -> list[int] | str:
        """Tokens, or why there are none."""
        done = self.run(sys.executable, "-c", GENERATE, json.dumps([model, join, peers]))
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr

    @contextmanager
    def running(self, program: str, *words: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            self.command(str(BIN / program), *words), env=self._environment, stdout=subprocess.PIPE, text=True
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def connect_labs() -> None:
    """A bridge between three namespaces."""
    lines = ["mount -t tmpfs none /run", "ip link add hub type bridge", "ip link set hub up"]
    for number, (name, address) in enumerate(LABS.items()):
        lines += [
            f"ip netns add {name}",
            f"ip link add v{number} type veth peer name eth0 netns {name}",
            f"ip link set v{number} master hub up",
            f"ip -n {name} addr add {address}/24 dev eth0",
            f"ip -n {name} link set eth0 up",
            f"ip -n {name} link set lo up",
            f"ip -n {name} route add default dev eth0",
        ]
    for line in lines:
        subprocess.run(line.split(), check=True)


def ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a peer says once it serves."""
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        assert event["event"] != "error", event
        if event["event"] == "ready":
            return event
    raise AssertionError("the peer ended")


def main(folder: Path) -> None:
    connect_labs()
    oxford, kyoto, elsewhere = (Place(name, folder) for name in LABS)
    model = str(tiny_llama())

    def serve(place: Place, blocks: str) -> subprocess.Popen[str]:
        token = oxford.petal("swarm", "invite", "two", "--label", f"lab={place.name}")
        options = ["--blocks", blocks, "--host", place.address, "--join", token, "--json"]
        return stack.enter_context(place.running("petal-serve", model, *options))

    def invite() -> str:
        return oxford.petal("swarm", "invite", "two", "--role", "client")

    with ExitStack() as stack:
        oxford.petal("swarm", "init", "two", "--address", f"{oxford.address}:31400")
        with oxford.running("petal", "swarm", "admin", "two"):
            time.sleep(5)
            peers = [ready(serve(oxford, "0:2")), ready(serve(kyoto, "2:4"))]
            friend, foe = invite(), invite()
            said = kyoto.generate(model, friend)
            assert isinstance(said, list), said
            assert oxford.generate(model, foe) == said
            outside = elsewhere.generate(model, None, tuple(peer["address"] for peer in peers))
            assert "refused: No peer answered" in outside, outside
            [member] = _names(folder / "oxford")
            oxford.petal("swarm", "revoke", member, "--swarm", "two")
            started = time.monotonic()
            while isinstance(oxford.generate(model, foe), list):
                assert time.monotonic() - started < CUT_S
            assert kyoto.generate(model, friend) == said
            oxford.petal("swarm", "rotate", "two")
            assert kyoto.generate(model, friend) == said
            late = invite()
        assert kyoto.generate(model, friend) == said, "the admin is off, and all goes on"
        assert "does not answer" in elsewhere.generate(model, late)
        with oxford.running("petal", "swarm", "admin", "two"):
            time.sleep(5)
            assert elsewhere.generate(model, late) == said, "the admin is back"
    print("both labs did as they should")


def _names(home: Path) -> list[str]:
    """Names of the memberships in a place's home."""
    return [Membership(path.parent).name for path in home.glob("petal/members/*/key.pem")]


if __name__ == "__main__":
    with TemporaryDirectory(prefix="petal-labs-") as name:
        main(Path(name))
