"""The op table and the choice of a backend."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import losa_kernels
from losa_kernels import bitmask, dispatch, native, pack_mask, pack_nm, settings, sparse_linear, unpack_mask
from losa_kernels.decoder_step import gated_silu

BACKENDS = settings.BACKEND.values[1:]
ROWS = [(op, backend) for op, row in dispatch.TABLE.items() for backend in row]


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.delenv("LOSA_BACKEND", raising=False)
    dispatch._first_that_can.cache_clear()
    yield
    dispatch._first_that_can.cache_clear()


@pytest.mark.parametrize(("op", "backend"), ROWS)
def test_every_row_leads_to_a_function(op, backend):
    module, _, name = dispatch.TABLE[op][backend].partition(":")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_op_has_a_reference():
    assert all("reference" in row and set(row) <= set(BACKENDS) for row in dispatch.TABLE.values())


@pytest.mark.parametrize("name", losa_kernels.__all__)
def test_public_names_import(name):
    assert getattr(losa_kernels, name) is not None and name in dir(losa_kernels)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'pack_everything'"):
        losa_kernels.pack_everything  # noqa: B018


@pytest.mark.skipif(native.missing("cpu") is not None, reason="losa_cpu is not loaded")
def test_auto_prefers_native_on_cpu():
    for device in (torch.device("cpu"), "cpu", torch.zeros(1)):
        assert dispatch.implementation("pack_mask", device) is bitmask.pack_native


def products(packed) -> None:
    """Every op whose Python function torch.compile traces."""
    unpack_mask(pack_mask(packed.values[:, :8] > 0), 8)
    packed.unpack()
    sparse_linear(torch.ones(2, 64), packed)
    gated_silu(torch.ones(2, 64))


def eagerly(packed) -> set[str]:
    """The native operators that ``products`` runs."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.add(str(operator))
            return operator(*args, **(kwargs or {}))

    names: set[str] = set()
    with Recorder():
        products(packed)
    return names


def on_fake_tensors(packed) -> set[str]:
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(tensor) for name, tensor in packed.tensors().items()}
        return eagerly(dataclasses.replace(packed, **tensors))


def compiled(packed) -> set[str]:
    names: set[str] = set()

    def keep(module, inputs):
        names.update(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch.compiler.reset()
    torch.compile(products, backend=keep, fullgraph=True)(packed)
    return names


@pytest.mark.skipif(native.missing("cpu") is not None, reason="losa_cpu is not loaded")
@pytest.mark.parametrize("run", [eagerly, on_fake_tensors, compiled])
def test_the_reference_can_be_forced_whatever_runs_the_ops(run, monkeypatch):
    packed = pack_nm(torch.ones(16, 64), pack_mask(torch.arange(64).expand(16, 64) % 2 == 0), 2, 4)
    names = {name.split(".")[1] for name in run(packed) if name.startswith("losa.")}
    assert names == {"pack_mask", "unpack_mask", "unpack_bitmask", "sparse_linear_nm", "gated_silu"}
    for forced in ("reference", " Reference "):
        monkeypatch.setenv("LOSA_BACKEND", forced)
        assert not [name for name in run(packed) if name.startswith("losa.")]
    monkeypatch.setenv("LOSA_BACKEND", "gpu")
    with pytest.raises(Exception, match="LOSA_BACKEND: expected auto, reference, triton, cuda or cpu, got .*gpu"):
        run(packed)


def test_other_devices_take_the_reference():
    assert dispatch.implementation("pack_mask", torch.zeros(1, device="meta")) is bitmask.pack_reference


def test_order_without_native_code(monkeypatch):
    """What is not loaded is passed over: cuda, then triton, then reference; on the CPU the reference."""
    table = {"op": {b: f"losa_kernels.dispatch:{n}" for b, n in zip(BACKENDS, "RTCP", strict=True)}}
    monkeypatch.setattr(dispatch, "TABLE", table)
    for name in "RTCP":
        monkeypatch.setattr(dispatch, name, name, raising=False)
    for absent, cuda, cpu in [((), "C", "P"), (("cuda",), "T", "P"), (("cuda", "triton", "cpu"), "R", "R")]:
        monkeypatch.setattr(dispatch, "unavailable", lambda backend, a=absent: "absent" if backend in a else None)
        dispatch._first_that_can.cache_clear()
        assert dispatch.implementation("op", "cuda:0") == cuda
        assert dispatch.implementation("op", "cpu") == cpu


def test_a_forced_backend_without_a_row_for_the_device_falls_through(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None if backend in ("reference", "cuda") else "absent")
    monkeypatch.setenv("LOSA_BACKEND", "cuda")
    assert dispatch.implementation("pack_mask", "cpu") is bitmask.pack_reference


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_forced_backend_that_cannot_load_is_an_error(monkeypatch):
    monkeypatch.setenv("LOSA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="LOSA_BACKEND=cuda cannot be used: .*without CUDA"):
        dispatch.implementation("pack_mask", "cpu")


def test_forced_triton_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("LOSA_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="'triton' is not installed"):
        dispatch.implementation("pack_mask", "cpu")


def test_names_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="op: expected one of pack_mask.*'pack'"):
        dispatch.implementation("pack", "cpu")
    monkeypatch.setenv("LOSA_BACKEND", "gpu")
    with pytest.raises(ValueError, match="LOSA_BACKEND: expected auto.*'gpu'"):
        dispatch.implementation("pack_mask", "cpu")


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setenv("LOSA_BACKEND", "reference")
    with caplog.at_level(logging.INFO, logger="losa_kernels"):
        for _ in range(3):
            dispatch.implementation("pack_mask", torch.zeros(1))
    assert caplog.messages == ["pack_mask on cpu: reference (losa_kernels.bitmask:pack_reference)"]


def test_the_reference_serves_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda library: f"{library} is not built")
    for op, row in dispatch.TABLE.items():
        module, _, name = row["reference"].partition(":")
        assert dispatch.implementation(op, "cpu") is getattr(importlib.import_module(module), name)
