"""A process that tries strangers' grammars: who starts it may end it at any time, and loses nothing with it.

Reads JSON lines: first the tokenizer, then a grammar each; says for each what is wrong with it, or nothing.
"""

from __future__ import annotations

import contextlib
import json
import sys

from .grammar import GrammarCompiler, GrammarError

MEMORY_BYTES = 2 << 30


def main() -> None:
    with contextlib.suppress(ImportError):  # of Windows, where time is the only limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    given = json.loads(sys.stdin.readline())
    compiler = GrammarCompiler.of_file(given["tokenizer"], given["eos_ids"], given["vocab_size"])
    compiler.tokens  # noqa: B018 (takes a while, which is no grammar's fault)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_fault(compiler, json.loads(line))), flush=True)


def _fault(compiler: GrammarCompiler, grammar: str) -> str:
    try:
        compiler.compile(grammar).allowed(())
    except (GrammarError, MemoryError) as error:
        return str(error) or "the grammar takes too much memory"
    return ""


if __name__ == "__main__":
    main()
