"""Petal's programs run in this process: exit code, standard output and standard error."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from petal.client.cli.main import main as petal_main
from petal.peer.cli import main as petal_serve_main


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def output(self) -> str:
        return self.out + self.err

    def line(self, program: str, code: int = 1) -> str:
        """The one line on standard error that says what is wrong."""
        assert self.code == code, self
        assert "Traceback" not in self.output
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert lines[0].startswith(f"{program}: ")
        return lines[0]


class _Stream(io.TextIOWrapper):
    """Standard output or error that remembers, with an encoding of one's choice."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    @property
    def text(self) -> str:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode(self.encoding)


def run(program: Callable[[list[str]], None], *arguments: object, encoding: str = "utf-8") -> Ran:
    """Run a program's `main` with these arguments."""
    out, err = _Stream(encoding), _Stream(encoding)
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
    assert isinstance(code, int), f"no exit code but {code!r}"
    return Ran(code, out.text, err.text)


def petal(*arguments: object, encoding: str = "utf-8") -> Ran:
    return run(petal_main, *arguments, encoding=encoding)


def petal_serve(*arguments: object) -> Ran:
    return run(petal_serve_main, *arguments)


def serve(model: object, *options: object, tmp_path: Path) -> Ran:
    """petal-serve on loopback, with an identity of its own."""
    return petal_serve(model, "--host", "127.0.0.1", "--identity", tmp_path / "identity", *options)
