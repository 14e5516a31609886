"""The build: what it contains, and that the package works with less of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import losa_kernels
from losa_kernels import native

ROOT = Path(__file__).parents[2]
info = native.build_info()

built = pytest.mark.skipif(info is None, reason="the extension is not built")


def run_python(code: str, folder: Path, **environment: str) -> str:
    """Run ``code`` in a new interpreter in ``folder``; its output."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture
def without_libraries(tmp_path) -> Path:
    """A copy of losa_kernels as an install with LOSA_NO_EXT=1 leaves it."""
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "losa_kernels", tmp_path / "losa_kernels", ignore=left_out)
    return tmp_path


@built
def test_build_info():
    assert info["version"] == losa_kernels.__version__
    assert info["torch_target"] == "2.11"
    assert re.fullmatch(r"2\.\d+\.\d+\S*", info["torch_headers"])
    assert info["compiler"]
    assert info["cuda_built"] == (info["cuda"] is not None) == bool(info["cuda_archs"])
    assert info["cuda_built"] == (native.LIBRARY_FOLDER / native.LIBRARIES["cuda"]).exists()
    assert info["cpu_isa_compiled"][0] == "scalar" and native.cpu_isa() in info["cpu_isa_compiled"]


OBJECTS = list(ROOT.glob("build/cmake-*/CMakeFiles/losa_cpu_*.dir/**/*.o"))


@pytest.mark.skipif(not OBJECTS or shutil.which("nm") is None, reason="needs the objects of a build, and nm")
def test_code_for_one_instruction_set_is_linked_into_no_other():
    # A weak symbol (an inline function or a template) may be taken from any object that has it.
    assert {file.name for file in OBJECTS} <= {"kernels.cpp.o", "bfloat16_pairs.cpp.o"}
    for file in OBJECTS:
        symbols = subprocess.run(["nm", "-C", "--defined-only", "-g", file], capture_output=True, text=True, check=True)
        isa = file.relative_to(ROOT).parts[3].removeprefix("losa_cpu_").removesuffix(".dir")
        own = f"::{isa}::kKernels" if file.name == "kernels.cpp.o" else "::plan_bfloat16_pairs(long, bool)"
        names = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
        assert len(names) == 1 and names[0].endswith(own), f"{file}: {names}"


@built
def test_the_instruction_set_can_be_capped(monkeypatch):
    monkeypatch.setenv("LOSA_CPU_ISA", "auto")
    best = native.cpu_isa()
    monkeypatch.setenv("LOSA_CPU_ISA", "scalar")
    assert native.cpu_isa() == "scalar"
    monkeypatch.setenv("LOSA_CPU_ISA", "avx512")
    assert native.cpu_isa() == best


@built
def test_status_says_what_is_loaded():
    status = native.status()
    assert status["losa_cpu"].startswith("loaded (instruction set ")
    if torch.version.cuda is None:
        assert status["losa_cuda"] == f"not loaded: torch {torch.__version__} is built without CUDA"
    elif info["cuda_built"]:
        assert status["losa_cuda"].startswith("loaded (CUDA ")


@pytest.mark.subprocess
def test_works_without_libraries(without_libraries):
    out = run_python(
        # An editable install would still find the original's module.
        "import sys; sys.modules['losa_kernels._build_info'] = None\n"
        "import torch, losa_kernels as k; from losa_kernels import native, dispatch, bitmask\n"
        "assert native.build_info() is native.cpu_isa() is None\n"
        "assert dispatch.implementation('pack_mask', 'cpu') is bitmask.pack_reference\n"
        "m = torch.rand(5, 21) < 0.5; assert torch.equal(k.unpack_mask(k.pack_mask(m), 21), m)\n"
        "print(native.status()['losa_cpu'])",
        without_libraries,
    )
    assert out.startswith("not loaded: losa_cpu.so is not built (LOSA_NO_EXT=1")


@pytest.mark.subprocess
def test_a_library_that_cannot_load_is_reported_not_fatal(without_libraries):
    (without_libraries / "losa_kernels" / "losa_cpu.so").write_bytes(b"not a library")
    out = run_python("from losa_kernels import native; print(native.status()['losa_cpu'])", without_libraries)
    assert out.startswith("not loaded: losa_cpu.so cannot be loaded: ")


@built
@pytest.mark.subprocess
def test_libraries_with_other_operators_than_the_checkout_are_left_out(without_libraries):
    for library in (ROOT / "losa_kernels").glob("*.so"):
        shutil.copy(library, without_libraries / "losa_kernels")
    (without_libraries / "csrc").mkdir()
    schemas = without_libraries / "csrc" / "schemas.cpp"
    found = []
    for added in ("", "// one more"):
        schemas.write_text((ROOT / "csrc" / "schemas.cpp").read_text() + added)
        code = "import losa_kernels; from losa_kernels import native; print(native.status()['losa_cpu'])"
        found.append(run_python(code, without_libraries))
    assert found[0].startswith("loaded")
    assert found[1].startswith("not loaded: losa_cpu.so was built with other operators than csrc/schemas.cpp has")


@pytest.mark.subprocess
def test_imports_without_triton_or_losa():
    """losa_kernels needs torch and numpy only: neither Triton nor losa may be imported along with its public names."""
    out = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import losa_kernels\n"
        "assert 'torch._dynamo' not in sys.modules, 'it takes as long as to import torch'\n"
        "for name in losa_kernels.__all__: getattr(losa_kernels, name)\n"
        "print([m for m in ('losa', 'transformers', 'pydantic') if m in sys.modules])",
        ROOT,
    )
    assert out == "[]"


@pytest.mark.subprocess
@pytest.mark.parametrize(("skip", "modules"), [("1", "0"), ("0", "1")])
def test_no_ext_leaves_out_the_native_part(skip, modules):
    out = run_python(
        "import runpy, setuptools\n"
        "setuptools.setup = lambda **settings: print(len(settings['ext_modules']))\n"
        "runpy.run_path('setup.py')",
        ROOT,
        LOSA_NO_EXT=skip,
    )
    assert out == modules


@built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_libraries_bind_to_torch_by_name_only():
    """losa_cuda must name libtorch_cuda, or it cannot load; a RUNPATH would name the build machine's folders."""
    for backend, name in native.LIBRARIES.items():
        path = native.LIBRARY_FOLDER / name
        if not path.exists():
            continue
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert "[libtorch_cpu.so]" in dynamic and "RUNPATH" not in dynamic and "RPATH" not in dynamic
        assert ("[libtorch_cuda.so]" in dynamic) == (backend == "cuda")
        assert "libcudart" not in dynamic
