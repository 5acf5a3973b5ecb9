"""Tries grammars in a process that is killed where they take too long, and keeps those that are good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import OrderedDict

from .grammar import MOST_CHARACTERS, GrammarCompiler, GrammarError, GrammarMatcher

# Of one grammar; the worker itself takes longer to begin with.
COMPILE_S = 5.0
START_S = 60.0
# Grammars kept, and those that may wait for the worker.
MOST_KEPT = 64
MOST_WAITING = 32


class GrammarChecker:
    """Matchers of grammars that anybody may send."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._kept: OrderedDict[str, GrammarMatcher] = OrderedDict()
        self._worker: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def matcher(self, grammar: str) -> GrammarMatcher:
        """One of its own, at the grammar's beginning. Raises GrammarError."""
        if grammar not in self._kept:
            if len(grammar) > MOST_CHARACTERS:
                raise GrammarError(f"a grammar has at most {MOST_CHARACTERS} characters, not {len(grammar)}")
            if self._waiting >= MOST_WAITING:
                raise GrammarError("too many grammars wait to be compiled; try again")
            self._waiting += 1
            try:
                async with self._turn:
                    await self._check(grammar)
            finally:
                self._waiting -= 1
            # What the worker could do within its limits can be done here, too.
            self._kept[grammar] = await asyncio.to_thread(self._compiler.compile, grammar)
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        return self._kept[grammar].fresh()

    async def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            await worker.wait()

    async def _check(self, grammar: str) -> None:
        worker = self._worker or await self._start()
        assert worker.stdin
        assert worker.stdout
        try:
            worker.stdin.write(json.dumps(grammar).encode() + b"\n")
            await worker.stdin.drain()
            said = await asyncio.wait_for(worker.stdout.readline(), COMPILE_S)
        except (asyncio.TimeoutError, ConnectionError):
            said = b""
        except BaseException:
            await self.close()  # its answer would be taken for the next one's
            raise
        if not said:
            await self.close()
            raise GrammarError(f"the grammar takes too much time or memory to compile (limit: {COMPILE_S:g} s)")
        if fault := json.loads(said):
            raise GrammarError(fault)

    async def _start(self) -> asyncio.subprocess.Process:
        """Raises GrammarError where the worker does not come up."""
        tokenizer = self._compiler.tokenizer
        command = [sys.executable, "-m", f"{__package__}.worker"]
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        worker = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=null, env=environment, start_new_session=True
        )
        self._worker = worker
        given = {
            "tokenizer": tokenizer.files()["tokenizer.json"],
            "eos_ids": sorted(tokenizer.eos_ids),
            "vocab_size": self._compiler.vocab_size,
        }
        assert worker.stdin
        assert worker.stdout
        try:
            worker.stdin.write(json.dumps(given).encode() + b"\n")
            await worker.stdin.drain()
            ready = await asyncio.wait_for(worker.stdout.readline(), START_S)
        except BaseException:
            await self.close()
            raise
        if not ready:
            await self.close()
            raise GrammarError("grammars cannot be compiled here: the worker ended at once")
        return worker
