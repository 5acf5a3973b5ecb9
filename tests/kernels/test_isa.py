"""Instruction sets: which are there, which is taken, and whose products have the same bits."""

from __future__ import annotations

import itertools
import platform
import shutil
from pathlib import Path

import pytest
import torch
from petal.kernels.backend import LayerSpec
from petal.kernels.cpu import library
from petal.kernels.cpu.backend import CpuBackend
from petal.kernels.cpu.isa import NATIVE, VARIABLE, X86_64, NoSuchISA, allowed, isas
from petal.kernels.formats.base import QuantizedTensor
from petal.kernels.registry import NoBackend, backend_for
from torch import Tensor

from .batches import batch_of, chain, tree
from .conftest import fresh_kernels
from .quantized_weights import INTEGER, VARIANTS, random_tensors

HASWELL = "flags\t\t: fpu sse2 ssse3 fma sse4_1 sse4_2 popcnt f16c bmi1 avx2 bmi2\n"
CASCADE_LAKE = HASWELL.strip() + " avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni\n"
SAPPHIRE_RAPIDS = CASCADE_LAKE.strip() + " avx512vbmi avx512_bf16 amx_bf16 amx_tile amx_int8\n"
ALL = [isa.name for isa in X86_64]


def system(root: Path, cpuinfo: str) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\n{cpuinfo}power management:\n")
    return root


@pytest.fixture
def _x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.usefixtures("_x86")
@pytest.mark.parametrize(
    ("cpuinfo", "names"),
    [
        (SAPPHIRE_RAPIDS, ALL),
        (SAPPHIRE_RAPIDS.replace(" amx_bf16", ""), ALL[1:]),
        (CASCADE_LAKE, ["avx512", "avx2", "portable"]),
        (CASCADE_LAKE.replace(" avx512_vnni", ""), ["avx2", "portable"]),
        (HASWELL, ["avx2", "portable"]),
        (HASWELL.replace(" fma", ""), ["portable"]),
        ("flags\t\t: fpu sse2\n", []),
    ],
    ids=["all", "no AMX", "Cascade Lake", "Skylake", "Haswell", "Ivy Bridge", "of long ago"],
)
def test_what_a_processor_has(tmp_path: Path, cpuinfo: str, names: list[str]) -> None:
    assert [isa.name for isa in isas(system(tmp_path, cpuinfo))] == names
    assert [isa.name for isa in allowed(system(tmp_path, cpuinfo))] == names


@pytest.mark.usefixtures("_x86")
def test_where_nobody_tells_the_compiler_finds_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isas(tmp_path) == [NATIVE]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert isas(system(tmp_path, HASWELL)) == [NATIVE]
    assert NATIVE.flags == ("-march=native",)
    assert "-march=native" not in {flag for isa in X86_64 for flag in isa.flags}


@pytest.mark.usefixtures("_x86")
@pytest.mark.parametrize(
    ("pin", "said"),
    [
        (
            "avx512",
            "PETAL_ISA=avx512: this processor lacks avx512",
        ),
        ("AVX2", "PETAL_ISA=AVX2: there is no AVX2"),
    ],
)
def test_a_pin_that_cannot_be_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin: str, said: str
) -> None:
    root = system(tmp_path, HASWELL)
    monkeypatch.setenv(VARIABLE, pin)
    with pytest.raises(NoSuchISA) as refused:
        allowed(root)
    assert str(refused.value) == f"{said}; choose one of avx2, portable, torch, or leave it out"
    for name, found in (("portable", ["portable"]), ("torch", []), ("", ["avx2", "portable"])):
        monkeypatch.setenv(VARIABLE, name)
        assert [isa.name for isa in allowed(root)] == found


def test_a_pin_is_no_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be compiled nothing else takes its place."""
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    with fresh_kernels():
        monkeypatch.setenv(VARIABLE, isas()[-1].name)
        with pytest.raises(NoBackend, match=r"PETAL_ISA=\w+ cannot be had here: install a C compiler, as with apt"):
            backend_for()
        monkeypatch.setenv(VARIABLE, "nonsense")
        with pytest.raises(NoBackend, match="PETAL_ISA=nonsense: there is no nonsense; choose one of"):
            backend_for()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_old_compiler_makes_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no flag of the best instruction set."""
    *_, worst = isas()
    cc = tmp_path / "cc"
    cc.write_text(
        '#!/bin/sh\ncase " $* " in *" -mavx2 "*) echo "unrecognized -mavx2" >&2; exit 1;; esac\nexec cc "$@"\n'
    )
    cc.chmod(0o755)
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    monkeypatch.setenv("CC", str(cc))
    monkeypatch.setenv("PETAL_CFLAGS", "-O0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    with fresh_kernels():
        found = library.kernels()
    assert found is not None
    assert found.isa is worst


def test_prebuilt_kernels_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler is asked; what cannot be loaded is passed over."""
    made = library.kernels()
    if made is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.delenv(VARIABLE, raising=False)
    prebuilt = tmp_path / f"{made.isa.name}.so"
    prebuilt.write_bytes(b"of another system")
    with fresh_kernels():
        assert library.kernels() is None
    shutil.copy(made.path, prebuilt)
    with fresh_kernels():
        assert library.kernels() == (prebuilt, made.isa)


# Bits.


@pytest.fixture(scope="module")
def backends() -> dict[str, CpuBackend]:
    """One of each instruction set that this processor has."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, fresh_kernels():
        for isa in isas():
            patch.setenv(VARIABLE, isa.name)
            library.kernels.cache_clear()
            try:
                found[isa.name] = CpuBackend()
            except NoSuchISA:  # no compiler, or no leave to use the matrix unit
                continue
    if not found:
        pytest.skip("no kernels here")
    return found


def alike(backends: dict[str, CpuBackend], dtype: torch.dtype | None) -> list[list[CpuBackend]]:
    """Groups of backends that promise each other's bits; None: in integer products, where only rounding tells."""
    groups: dict[str, list[CpuBackend]] = {}
    for backend in backends.values():
        name = backend.arithmetic(dtype) if dtype else backend.isa.arithmetic.replace("amx", "native")
        groups.setdefault(name, []).append(backend)
    return list(groups.values())


def equal(groups: list[list[Tensor]]) -> None:
    for group in groups:
        assert all(torch.equal(one, group[0]) for one in group[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_products(backends: dict[str, CpuBackend], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 577).to(dtype), torch.randn(300)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 577)
        groups = [[backend.linear(weight, bias)(x) for backend in group] for group in alike(backends, dtype)]
        equal(groups)
        # Negative control. "portable" is "native" here: products of bfloat16 are exact before they are added.
        control = groups if dtype == torch.float32 else [group for group in groups if group[0] is not groups[-1][0]]
        assert all(not torch.equal(a[0], b[0]) for a, b in itertools.combinations(control, 2))
        for group in groups:
            expected = x.to(dtype).double() @ weight.double().T + bias.double()
            torch.testing.assert_close(group[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_quantized_products(backends: dict[str, CpuBackend], name: str) -> None:
    """Those in integers have the same bits with the matrix unit and without."""
    torch.manual_seed(0)
    shape = (300, 768)
    tensors, bias = random_tensors(VARIANTS[name], shape), torch.randn(shape[0])
    for rows in (1, 40):
        x = torch.randn(rows, shape[1])
        results = []
        for group in alike(backends, None if name in INTEGER else torch.bfloat16):
            layers = [backend.linear(QuantizedTensor(VARIANTS[name], tensors, shape), bias) for backend in group]
            results.append([layer(x) for layer in layers])
        equal(results)
        for group in results[1:]:
            assert (group[0] - results[0][0]).norm() < 3e-3 * group[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(backends: dict[str, CpuBackend], dtype: torch.dtype) -> None:
    batch = batch_of([(40, tree(9)), (0, chain(33)), (100, chain(1))], dtype=dtype)

    def attended(backend: CpuBackend) -> Tensor:
        fresh = batch.with_pages()
        storage = backend.kv_storage([LayerSpec(2, 64, 64, None)], *fresh.k_pages.shape[:2], dtype)
        storage.keys, storage.values = [fresh.k_pages], [fresh.v_pages]
        return storage.attention([fresh.metadata])(0, fresh.q, fresh.k, fresh.v, scale=0.2)

    equal([[attended(backend) for backend in group] for group in alike(backends, torch.float32)])


def test_small_operations(backends: dict[str, CpuBackend]) -> None:
    torch.manual_seed(0)
    x, up, weight = 8 * torch.randn(33, 577), torch.randn(33, 577), torch.randn(577)
    heads, turns = torch.randn(33, 3, 64), 6.3 * torch.rand(33, 64)
    operations = {
        "norm": lambda backend: backend.rms_norm(weight, 1e-5)(x),
        "gate": lambda backend: backend.silu_gate(x, up),
        "rope": lambda backend: backend.rotate(heads.clone(), turns.cos(), turns.sin()),
        "top": lambda backend: backend.topk(x, 50)[1],
    }
    for operation in operations.values():
        equal([[operation(backend) for backend in group] for group in alike(backends, torch.float32)])


# Fitting in.


def test_another_arithmetic_is_a_backend_away(backends: dict[str, CpuBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with fresh_kernels():
        best = backend_for()
        best.threads = 1
        for dtype in (torch.float32, torch.bfloat16):
            for backend in backends.values():
                name = backend.arithmetic(dtype)
                found = best.in_arithmetic(name, dtype)
                assert found is not None
                assert (found.arithmetic(dtype), found.threads) == (name, 1)
            assert best.in_arithmetic("sm_90", dtype) is None
        monkeypatch.setenv(VARIABLE, isas()[0].name)
        library.kernels.cache_clear()
        others = {isa.arithmetic for isa in isas()[1:]} - {isas()[0].arithmetic}
        pinned = backend_for()
        assert all(pinned.in_arithmetic(name, torch.bfloat16) is None for name in others), "a pin is kept"
