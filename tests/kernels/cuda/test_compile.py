"""Machine code is compiled once, in the background, and kept where that is possible; no NVRTC is needed here."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from petal.kernels.cuda import compile as module
from petal.kernels.cuda import nvrtc
from petal.kernels.cuda.blobs import LAYOUTS
from petal.kernels.cuda.compile import Compiler, CubinCache, Program, Programs, architecture
from petal.kernels.cuda.linear import Linear
from petal.kernels.cuda.nvrtc import NvrtcError
from petal.kernels.cuda.tiling import Tiling

PROGRAM = Program("elementwise.cu", (("ROWS", 8),))


class FakeCompiler:
    """Takes as long as it is told to."""

    def __init__(self) -> None:
        self.calls: list[Program] = []
        self.go = threading.Event()
        self.error: NvrtcError | None = None

    def __call__(self, program: Program) -> bytes:
        self.calls.append(program)
        assert self.go.wait(10)
        if self.error:
            raise self.error
        return f"code of {program.choices}".encode()


@pytest.fixture
def compiler() -> Iterator[FakeCompiler]:
    made = FakeCompiler()
    yield made
    made.go.set()


def programs(compiler: FakeCompiler, folder: Path) -> Programs:
    return Programs(compiler, lambda program: f"{program.source}-{hash(program)}", CubinCache(folder), 2)


def test_nobody_waits_for_a_compile(compiler, tmp_path):
    made = programs(compiler, tmp_path)
    assert made.ready(PROGRAM) is None
    assert made.ready(PROGRAM) is None
    compiler.go.set()
    assert made.start(PROGRAM).result(10) == made.ready(PROGRAM) == b"code of (('ROWS', 8),)"
    assert compiler.calls == [PROGRAM]


def test_the_next_process_finds_the_code(compiler, tmp_path):
    compiler.go.set()
    code = programs(compiler, tmp_path).start(PROGRAM).result(10)
    assert programs(compiler, tmp_path).start(PROGRAM).result(10) == code
    assert len(compiler.calls) == 1
    other = Program(PROGRAM.source, (("ROWS", 16),))
    assert programs(compiler, tmp_path).start(other).result(10) != code


@pytest.mark.parametrize("damage", [b"", b"short", None], ids=["empty", "short", "one bit"])
def test_a_damaged_file_is_made_anew(compiler, tmp_path, damage):
    compiler.go.set()
    code = programs(compiler, tmp_path).start(PROGRAM).result(10)
    (file,) = tmp_path.iterdir()
    stored = file.read_bytes()
    file.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]) if damage is None else damage)
    assert programs(compiler, tmp_path).start(PROGRAM).result(10) == code
    assert len(compiler.calls) == 2
    assert file.read_bytes() == stored


def test_where_nothing_can_be_kept_code_lasts_as_long_as_the_process(compiler, tmp_path, caplog):
    blocked = tmp_path / "a file"
    blocked.write_text("no folder")
    cache = CubinCache(blocked / "cuda")
    cache.put("a", b"code")
    cache.put("b", b"more")
    assert (cache.get("a"), cache.get("b")) == (b"code", b"more")
    assert len(caplog.records) == 1
    assert "cannot be kept" in caplog.text


def test_two_processes_write_at_once(tmp_path):
    """Readers see whole files or none, whoever writes."""
    writer = (
        "import sys; from pathlib import Path; from petal.kernels.cuda.compile import CubinCache\n"
        "cache = CubinCache(Path(sys.argv[1])); code = sys.argv[2].encode() * 100_000\n"
        "for _ in range(60): cache.put('key', code)"
    )
    running = [subprocess.Popen([sys.executable, "-c", writer, str(tmp_path), letter]) for letter in "ab"]
    seen: set[bytes | None] = set()
    while any(process.poll() is None for process in running):
        code = CubinCache(tmp_path).get("key")
        seen.add(code and code[:1] + code[-1:] + bytes(len(code) == 100_000))
    assert [process.returncode for process in running] == [0, 0]
    assert seen - {None} <= {b"aa\0", b"bb\0"}
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_failed_compile_is_said_once_and_stays_failed(compiler, tmp_path, caplog):
    compiler.error = NvrtcError("line 3: expected a ';'")
    compiler.go.set()
    made = programs(compiler, tmp_path)
    with pytest.raises(NvrtcError, match="expected"):
        made.start(PROGRAM).result(10)
    assert made.ready(PROGRAM) is made.ready(PROGRAM) is None
    assert len(compiler.calls) == len(caplog.records) == 1
    assert not list(tmp_path.iterdir())


class FakeNvrtc:
    def __init__(self, path: object) -> None:
        pass

    def version(self) -> tuple[int, int]:
        return (13, 0)

    def architectures(self) -> list[int]:
        return [80, 90]


@pytest.fixture
def program_of_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What stands in for the compiling process."""
    script = tmp_path / "compiler.py"
    monkeypatch.setattr(nvrtc, "library", lambda: tmp_path / "libnvrtc.so")
    monkeypatch.setattr(nvrtc, "Nvrtc", FakeNvrtc)
    monkeypatch.setattr(nvrtc, "__file__", str(script))
    return script


def test_a_compile_that_hangs_is_ended(program_of_compiler):
    program_of_compiler.write_text("import time; time.sleep(60)")
    with pytest.raises(NvrtcError, match=r"linear.cu took more than 0 s"):
        Compiler("sm_90a", limit=0.3)(Program("linear.cu"))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import sys; sys.exit('kernel.cu(7): error')", r"kernel.cu\(7\): error"),
        ("import os; os.abort()", "ended with status -6"),
        ("", "ended with status 0"),
    ],
    ids=["refused", "crashed", "empty"],
)
def test_a_compiler_that_fails_raises_its_first_line(program_of_compiler, script, said):
    program_of_compiler.write_text(script)
    with pytest.raises(NvrtcError, match=said):
        Compiler("sm_90a")(Program("linear.cu"))


def test_the_compiler_gets_source_headers_and_choices(program_of_compiler):
    program_of_compiler.write_text(
        "import json, sys; r = json.load(sys.stdin)\n"
        "assert 'extern' in r['source'] and {'ptx.cuh', 'formats.cuh'} <= r['headers'].keys()\n"
        "print(*r['options'], end='')"
    )
    options = Compiler("sm_90a")(Program("linear.cu", (("ROWS", 8),))).split()
    assert {b"--gpu-architecture=sm_90a", b"-DROWS=8"} <= set(options)


def test_a_card_that_the_compiler_does_not_know_is_refused(program_of_compiler, monkeypatch):
    with pytest.raises(NvrtcError, match=r"\(13, 0\) does not know sm_75"):
        Compiler("sm_75")
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    with pytest.raises(NvrtcError, match="no wheel"):
        Compiler("sm_90a")


def test_code_is_kept_by_source_choices_architecture_and_driver(program_of_compiler, monkeypatch):
    key = Compiler("sm_90a", 13000).key(PROGRAM)
    others = [
        Compiler("sm_80", 13000).key(PROGRAM),
        Compiler("sm_90a", 13010).key(PROGRAM),
        Compiler("sm_90a", 13000).key(Program(PROGRAM.source)),
        Compiler("sm_90a", 13000).key(Program("linear.cu", PROGRAM.choices)),
    ]
    changed = {**module.texts(), "ptx.cuh": "// another"}
    monkeypatch.setattr(module, "texts", lambda: changed)
    assert len({key, *others, Compiler("sm_90a", 13000).key(PROGRAM)}) == 6


class FakeRuntime:
    """Compiles when it is waited for."""

    def __init__(self, error: NvrtcError | None = None) -> None:
        self.error, self.waits = error, list[bool]()

    def kernel(self, program: Program, name: str, threads: int, shared: int, *, wait: bool) -> str | None:
        self.waits.append(wait)
        if self.error:
            raise self.error
        return "kernel" if wait else None


def asked(runtime: FakeRuntime, wait: bool, twin: bool, patient: bool = False) -> object:
    products, layout = object.__new__(Linear), LAYOUTS["Int4"]
    products._runtime, products._patient = runtime, False
    if not patient:
        return products._compiled(PROGRAM, Tiling(8), layout, wait, twin)
    with products.patience():
        return products._compiled(PROGRAM, Tiling(8), layout, wait, twin)


def test_triton_stands_in_while_nobody_waits():
    assert asked(FakeRuntime(), wait=False, twin=True) is None
    assert asked(FakeRuntime(), wait=True, twin=True) == "kernel"
    assert asked(FakeRuntime(), wait=False, twin=False) == "kernel"  # nothing else could compute it


def test_what_is_captured_waits_for_the_compiler():
    assert asked(FakeRuntime(), wait=False, twin=True, patient=True) == "kernel"


def test_triton_stands_in_for_what_cannot_be_compiled():
    error = NvrtcError("took more than 60 s")
    assert asked(FakeRuntime(error), wait=True, twin=True) is None
    with pytest.raises(NvrtcError, match="60 s"):
        asked(FakeRuntime(error), wait=False, twin=False)


def test_architectures():
    assert [architecture(c) for c in ((8, 0), (8, 9), (9, 0), (12, 0))] == ["sm_80", "sm_89", "sm_90a", "sm_120"]
