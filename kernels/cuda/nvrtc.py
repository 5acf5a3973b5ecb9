"""NVIDIA's run-time compiler out of torch's own wheels, through ctypes: no toolkit on a volunteer's machine.

Run as a program it compiles one request, so that a compile that hangs can be ended: `compile.py` calls it so. It
imports the standard library alone and is up at once.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class NvrtcError(RuntimeError):
    """The compiler is missing or refuses the source; the message is its log, or one sentence."""


def library() -> Path | None:
    """The newest libnvrtc of the installed wheels, or None."""
    found = [
        path
        for folder in dict.fromkeys(sys.path)
        for path in Path(folder or ".").glob("nvidia/*/lib/libnvrtc.so.*")
        if ".alt." not in path.name and "builtins" not in path.name
    ]
    return max(found, key=lambda path: path.name, default=None)


class Nvrtc:
    """The library at `path`. Raises NvrtcError if it cannot be loaded."""

    def __init__(self, path: str | Path) -> None:
        try:
            for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))  # it is looked for by name alone
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NvrtcError(f"the run-time compiler cannot be loaded: {error}") from error

    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def architectures(self) -> list[int]:
        """Compute capabilities that it compiles for, as 80 for 8.0."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, source: str, headers: Mapping[str, str], options: Sequence[str]) -> tuple[bytes, str]:
        """The machine code of `source`, which may include `headers` by name, and the log. Raises NvrtcError."""
        program = ctypes.c_void_p()
        names, texts = (_strings(items) for items in (list(headers), list(headers.values())))
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), texts, names
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._text("ProgramLog", program).decode(errors="replace").strip("\0\n ")
            if status:
                raise NvrtcError(log or f"the run-time compiler failed with status {status}.")
            return self._text("CUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.raw

    def _call(self, name: str, *arguments: object) -> None:
        if status := self._library[name](*arguments):
            raise NvrtcError(f"{name} of the run-time compiler failed with status {status}.")


def _strings(items: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(items))(*(item.encode() for item in items))


def main() -> int:
    """Standard input: the request as JSON (library, source, headers, options); standard output: the machine code."""
    request = json.load(sys.stdin)
    try:
        code, log = Nvrtc(request["library"]).compile(request["source"], request["headers"], request["options"])
    except NvrtcError as error:
        print(error, file=sys.stderr)
        return 1
    print(log, file=sys.stderr)
    sys.stdout.buffer.write(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
