"""What loading a model takes: `python -m tests.support.load_memory FILE [BLOCKS]` prints one JSON object, in bytes.

`held` is what the program has more than before, `peak` the most that it had more meanwhile; pages of the file that
the system can drop at any time count as neither. What importing and a first small load take is there before.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

from petal.kernels.registry import backend_for
from petal.peer.model import load_span
from petal.peer.model.precision import precision_of
from petal.protocol.checkpoint.open import open_checkpoint

from .tiny import tiny_llama


def anonymous() -> int:
    """Bytes of this program that are no file's."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


class Peak(threading.Thread):
    """The most anonymous memory seen while it runs, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._end = anonymous(), threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.001):
            self.most = max(self.most, anonymous())

    def stop(self) -> int:
        self._end.set()
        self.join()
        return self.most


def main() -> None:
    path = Path(sys.argv[1])
    with open_checkpoint(tiny_llama()) as tiny:
        load_span(tiny, 0, 1)
    before, peak = anonymous(), Peak()
    peak.start()
    with open_checkpoint(path) as checkpoint:
        blocks = int(sys.argv[2]) if len(sys.argv) > 2 else checkpoint.n_blocks
        span = load_span(checkpoint, 0, blocks, precision=precision_of(checkpoint, "gguf"), backend=backend_for())
        counted = span.nbytes
    held, most = anonymous() - before, peak.stop() - before
    print(json.dumps({"file": path.stat().st_size, "counted": counted, "held": held, "peak": most}))


if __name__ == "__main__":
    main()
