"""Which way few rows take on a GPU, and when a weight has tiles: with fakes of what is asked of CUDA."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from losa_kernels import measured, native, pack_bitmask, pack_mask, pack_nm
from losa_kernels.packing.rows import take_rows
from losa_kernels.sparse_linear import cuda, tiles, ways

DENSE = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
KEPT = torch.rand(48, 128, generator=torch.Generator().manual_seed(1)) < 0.5
DENSE.masked_fill_(~KEPT, 0)
needs_native = pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))


class Gpu:
    """A GPU of 1 MB; ``log`` has the ways that ran, ``best`` is what measurements of a key find."""

    def __init__(self, monkeypatch):
        self.log, self.keys, self.made, self.best = [], [], 0, {}
        self.free, self.capturing, self.major = 1 << 20, False, 9
        monkeypatch.delenv("LOSA_SPARSE_LINEAR", raising=False)
        ways._major.cache_clear()
        for name, value in {
            "get_device_capability": lambda device: (self.major, 0),
            "is_current_stream_capturing": lambda: self.capturing,
            "mem_get_info": lambda device: (self.free, 1 << 20),
            "memory_reserved": lambda device: 3000,
            "memory_allocated": lambda device: 2000,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(measured, "fastest", self.fastest)
        monkeypatch.setattr(tiles, "make", self.make)
        monkeypatch.setattr(tiles, "multiply", lambda x, t, bias: self.ran("tiles", x @ tiles.unpack(t).T))
        monkeypatch.setattr(cuda, "window", lambda x, packed, bias: self.ran("window", x @ packed.unpack().T))
        monkeypatch.setattr(
            cuda.reference, "sparse_linear", lambda x, packed, bias: self.ran("unpack", x @ packed.unpack().T)
        )

    def fastest(self, op, key, candidates, device, table):
        self.keys.append((op, key, tuple(candidates), table))
        if not self.best:
            return table
        for run in candidates.values():
            try:
                run()
            except RuntimeError:
                self.log.append("failed")
        return self.best[key[0]]

    def make(self, packed):
        self.made += 1
        assert not self.capturing
        return tiles.pack(packed)

    def ran(self, way, y):
        self.log.append(way)
        return y


@pytest.fixture
def gpu(monkeypatch):
    yield Gpu(monkeypatch)
    ways._major.cache_clear()


@pytest.fixture
def packed():
    return pack_bitmask(DENSE, pack_mask(KEPT))


def product(packed, rows):
    x = torch.randn(rows, packed.shape[1]).bfloat16()
    with torch.no_grad():
        return cuda.sparse_linear(x, packed, None), x @ packed.unpack().T


def run(gpu, packed, rows=1):
    """The way that the product took."""
    y, expected = product(packed, rows)
    assert torch.equal(y, expected)
    return gpu.log[-1]


def test_the_table(gpu, packed):
    assert [run(gpu, packed, rows) for rows in (1, 4, 5, 16, 17)] == ["tiles"] * 4 + ["unpack"]
    gpu.major = 8
    ways._major.cache_clear()
    assert [run(gpu, packed, rows) for rows in (1, 4, 5, 16, 17)] == ["window"] * 2 + ["unpack"] * 3


def test_a_measurement_is_asked_for_by_shape_pattern_and_batch(gpu, packed):
    for rows in (1, 3, 8, 9):
        run(gpu, packed, rows)
    assert [key[0] for _, key, _, _ in gpu.keys] == [1, 4, 8, 16]
    assert {key[1:] for _, key, _, _ in gpu.keys} == {("48x128", "bitmask", "50 % kept", "bfloat16")}
    assert {names for _, _, names, _ in gpu.keys} == {ways.WAYS}
    kept = torch.tensor([True, False, False, True] * 8).expand(16, 32)
    weight = pack_nm(DENSE[:16, :32].half(), pack_mask(kept), 2, 4)
    with torch.no_grad():
        cuda.sparse_linear(torch.randn(2, 32).half(), weight, None)
    assert gpu.keys[-1][:2] == ("sparse_linear", (2, "16x32", "2:4", "50 % kept", "float16"))


def test_what_a_measurement_chooses_runs_and_tiles_stay_only_for_it(gpu, packed):
    gpu.best = {1: "window", 2: "tiles", 4: "unpack"}
    assert run(gpu, packed, 1) == "window" and gpu.made == 1 and packed._held.tiles is None
    assert run(gpu, packed, 2) == "tiles" and packed._held.tiles is not None
    assert run(gpu, packed, 4) == "unpack" and packed._held.tiles is not None
    assert gpu.made == 2


def test_tiles_that_were_taken_stay_for_the_graphs_that_hold_them(gpu, packed, monkeypatch):
    assert run(gpu, packed) == "tiles"
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "window")
    assert run(gpu, packed) == "window"
    monkeypatch.delenv("LOSA_SPARSE_LINEAR")
    gpu.best = {1: "unpack", 2: "window"}
    assert run(gpu, packed, 1) == "unpack" and run(gpu, packed, 2) == "window"
    assert packed._held.tiles is not None and gpu.made == 1


def test_a_shape_that_was_measured_makes_tiles_for_every_weight(gpu):
    for _ in range(2):
        assert run(gpu, pack_bitmask(DENSE, pack_mask(KEPT))) == "tiles"
    assert gpu.made == 2


def test_tiles_are_made_while_an_eighth_of_the_memory_stays_free(gpu, packed):
    needed = tiles.bytes_of(packed)
    gpu.free = (1 << 17) + needed - 1000  # what torch's allocator has in store counts
    assert run(gpu, packed) == "tiles"
    gpu.free -= 1
    other = pack_bitmask(DENSE, pack_mask(KEPT))
    assert run(gpu, other) == "window" and run(gpu, other, 8) == "unpack"
    assert gpu.keys[-1][1][-1] == "without tiles" and gpu.keys[-1][2] == ("window", "unpack")
    assert gpu.made == 1


def test_a_candidate_without_memory_fails(gpu, packed):
    gpu.free, gpu.best = 0, {1: "window"}
    assert run(gpu, packed) == "window" and "failed" in gpu.log


def test_no_memory_while_tiles_are_made(gpu, packed, monkeypatch):
    def make(packed):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiles, "make", make)
    assert run(gpu, packed) == "window"


def test_a_capture_makes_no_tiles_but_takes_those_there_are(gpu, packed):
    gpu.capturing = True
    assert run(gpu, packed) == "window" and gpu.made == 0
    gpu.capturing = False
    assert run(gpu, packed) == "tiles"
    gpu.capturing = True
    assert run(gpu, packed) == "tiles"


@pytest.mark.parametrize("best", ["window", "unpack"])
def test_a_capture_takes_what_was_measured(gpu, packed, monkeypatch, best):
    """Also where the measurement let go of the tiles that it made."""
    gpu.best = {1: best, 8: best}
    assert [run(gpu, packed, rows) for rows in (1, 8)] == [best] * 2 and packed._held.tiles is None
    known, gpu.capturing = {key for _, key, _, _ in gpu.keys}, True
    monkeypatch.setattr(measured, "fastest", lambda op, key, runs, device, table: best if key in known else table)
    assert [run(gpu, packed, rows) for rows in (1, 8)] == [best] * 2


@pytest.mark.parametrize("way", ways.WAYS)
def test_one_way_can_be_forced(gpu, packed, monkeypatch, way):
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", f" {way.upper()} ")
    assert [run(gpu, packed, rows) for rows in (1, 16)] == [way, way] and not gpu.keys


def test_what_cannot_be_forced(gpu, packed, monkeypatch):
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "fast")
    with pytest.raises(ValueError, match="LOSA_SPARSE_LINEAR: expected auto, window, tiles or unpack, got 'fast'"):
        product(packed, 1)
    monkeypatch.setenv("LOSA_SPARSE_LINEAR", "tiles")
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="LOSA_SPARSE_LINEAR=tiles: a capture makes no tiles"):
        product(packed, 1)
    gpu.capturing, gpu.free = False, 0
    with pytest.raises(RuntimeError, match="would leave less than 12% of the device's memory free"):
        product(packed, 1)


def test_other_dtypes_take_the_window_kernel(gpu, packed):
    with torch.no_grad():
        wide = pack_bitmask(DENSE.float(), pack_mask(KEPT))
        cuda.sparse_linear(torch.randn(2, 128), wide, None)
    assert gpu.log == ["window"] and not gpu.keys and not hasattr(wide, "_held")


@pytest.mark.parametrize("start", [0, 16, 32])
def test_parts_share_the_tiles_of_the_whole(gpu, packed, start):
    part = take_rows(packed, start, 48 if start else 20)
    assert run(gpu, part) == "tiles" and run(gpu, packed) == "tiles" and gpu.made == 1
    assert part._held.tiles.data is packed._held.tiles.data


def test_parts_that_begin_inside_a_tile_have_tiles_of_their_own(gpu, packed):
    assert run(gpu, take_rows(packed, 3, 40)) == "tiles" and gpu.made == 1
    assert getattr(packed, "_held", None) is None


def test_tiles_that_a_part_does_not_take_are_let_go(gpu, packed):
    part = take_rows(packed, 16, 48)
    gpu.best = {1: "window"}
    run(gpu, part)
    assert gpu.made == 1 and packed._held.tiles is None and part._held.tiles is None


def test_tiles_that_a_part_takes_are_made_once(gpu, packed):
    gpu.best = {1: "tiles", 2: "window"}
    assert run(gpu, take_rows(packed, 16, 48)) == "tiles" and run(gpu, packed, 2) == "window"
    assert run(gpu, take_rows(packed, 0, 16)) == "tiles" and gpu.made == 1


def test_files_copies_and_other_devices_have_no_tiles(gpu, packed):
    run(gpu, packed)
    for other in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed), copy.copy(packed), packed.to("cpu")):
        assert not hasattr(other, "_held") and torch.equal(other.unpack(), packed.unpack())
    part = take_rows(packed, 0, 16)
    assert len(pickle.dumps(part)) < len(pickle.dumps(packed)) + 4096
    assert not hasattr(pickle.loads(pickle.dumps(part)), "_whole")


@needs_native
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_compiled_graph_takes_what_eager_calls_chose(packed, monkeypatch):
    seen = []

    def multiply(x, data, offsets, rows, largest, bias):
        seen.append("tiles")
        made = tiles.Tiles(data, offsets, largest, (rows, x.shape[-1]), x.dtype)
        return x @ tiles.unpack(made).T

    library = torch.library.Library("losa", "IMPL")
    library.impl("sparse_linear_tiles", multiply, "CPU")
    monkeypatch.delenv("LOSA_SPARSE_LINEAR", raising=False)
    expected = packed.unpack()
    compiled = torch.compile(lambda x: cuda.sparse_linear(x, packed, None), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        x = torch.randn(1, 128).bfloat16()
        tolerance = {"rtol": 2e-2, "atol": 1e-1}
        torch.testing.assert_close(compiled(x), x @ expected.T, **tolerance)
        assert not seen
        ways.held_by(packed).tiles = tiles.pack(packed)
        packed._held.ways[1] = "tiles"
        torch.testing.assert_close(compiled(x), x @ expected.T, **tolerance)
        assert seen == ["tiles"]
        for rows in (8, 17):
            x = torch.randn(rows, 128).bfloat16()
            torch.testing.assert_close(compiled(x), x @ expected.T, **tolerance)
    assert seen == ["tiles"]
