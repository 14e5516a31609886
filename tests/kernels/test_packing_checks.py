"""Packed weights made of tensors that contradict each other: refused by name, at once or by ``check``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from losa_kernels import pack_24, pack_bitmask, pack_mask, pack_nm, sparse_linear
from losa_kernels.packing import Packed24, PackedBitmask, PackedNM
from losa_kernels.packing.rows import join_rows, take_rows

ROWS, COLUMNS = 32, 64
NARROW = 60  # the last byte of a row has padding bits


def kept_nm(rows, columns, keep_n, m):
    scores = torch.rand(rows, columns // m, m)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(keep_n, 2).indices, True).flatten(1)


@pytest.fixture
def bitmask():
    kept = torch.rand(ROWS, NARROW) < 0.4
    kept[3], kept[5], kept[5, 7] = True, False, True
    return pack_bitmask(torch.randn(ROWS, NARROW), pack_mask(kept))


@pytest.fixture
def nm():
    return pack_nm(torch.randn(ROWS, NARROW), pack_mask(kept_nm(ROWS, NARROW, 2, 4)), 2, 4)


@pytest.fixture
def two_four():
    return pack_24(torch.randn(ROWS, COLUMNS).half(), pack_mask(kept_nm(ROWS, COLUMNS, 2, 4)))


SHAPES = [
    ((-1, 64), "expected sizes >= 0"),
    ((32, -8), "expected sizes >= 0"),
    ((32.0, 64), "expected an integer, got 32.0"),
    ((True, 64), "expected an integer, got True"),
    (("32", 64), "expected an integer, got '32'"),
    ((32, 64, 1), "expected \\(out, in\\)"),
    (None, "expected \\(out, in\\), got None"),
    (64, "expected \\(out, in\\), got 64"),
    ((2**70, 64), "expected an integer of at most 62 bits, got 1180591620717411303424"),
]


@pytest.mark.parametrize("name", ["bitmask", "nm", "two_four"])
@pytest.mark.parametrize(("shape", "message"), SHAPES)
def test_shapes_that_are_none(request, name, shape, message):
    with pytest.raises(ValueError, match=f"^shape: {message}"):
        replace(request.getfixturevalue(name), shape=shape)


@pytest.mark.parametrize("name", ["bitmask", "nm", "two_four"])
@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**40, 64), (32, 2**40), (ROWS + 32, 64), (32, 128), (0, 0)])
def test_shapes_of_another_weight(request, name, shape):
    with pytest.raises(ValueError, match=r"^(shape|values|bitmask|meta): expected "):
        replace(request.getfixturevalue(name), shape=shape)


def wrong_tensors(tensor):
    """The tensor in forms that no format has."""
    yield tensor.tolist()
    yield None
    yield tensor.numpy()
    yield tensor.to(torch.complex64 if tensor.is_floating_point() else torch.int32)
    yield tensor.unsqueeze(0)
    yield tensor.flatten()[:-1]
    yield torch.stack([tensor, tensor], -1)[..., 0]  # with gaps
    yield tensor.flatten()[:1].expand(tensor.shape)
    yield tensor.to_sparse()


@pytest.mark.parametrize("name", ["bitmask", "nm", "two_four"])
def test_tensors_of_another_kind(request, name):
    packed = request.getfixturevalue(name)
    for field, tensor in packed.tensors().items():
        for wrong in wrong_tensors(tensor):
            if field == "values" and name == "bitmask" and getattr(wrong, "shape", None) == (tensor.numel() - 1,):
                continue  # that only the data tell
            with pytest.raises(ValueError, match=f"^{field}: expected "):
                replace(packed, **{field: wrong})
        others = [other for other in packed.tensors() if other != field]
        with pytest.raises(ValueError, match=f"^({'|'.join([field, *others])}): expected .* on (cpu|meta)"):
            replace(packed, **{field: tensor.to("meta")})


@pytest.mark.parametrize(
    ("keep_n", "m", "message"),
    [
        (2, 0, "keep_n: expected 0 < keep_n <= m, got 2 of 0"),
        (5, 4, "keep_n: expected 0 < keep_n <= m, got 5 of 4"),
        (0, 4, "keep_n: expected 0 < keep_n <= m"),
        (-2, 4, "keep_n: expected 0 < keep_n <= m"),
        (2, 7, "m: expected a divisor of in_features 60, got 7"),
        (2, 2**70, "m: expected an integer of at most 62 bits"),
        (2.0, 4, "keep_n: expected an integer, got 2.0"),
        (2, True, "m: expected an integer, got True"),
        (1, 4, "values: expected floating point"),
        (2, 6, "values: expected floating point"),
    ],
)
def test_patterns_of_another_weight(nm, keep_n, m, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(nm, keep_n=keep_n, m=m)


def test_more_values_than_weights(bitmask):
    values = torch.zeros(ROWS * NARROW + 1)
    with pytest.raises(ValueError, match=r"^values: expected at most 1920 of shape \(32, 60\), got 1921"):
        replace(bitmask, values=values)


def test_right_ones_pass(bitmask, nm, two_four):
    nothing = [
        pack_bitmask(torch.zeros(size), torch.zeros(size[0], -(-size[1] // 8), dtype=torch.uint8))
        for size in ((0, 60), (5, 0), (0, 0))
    ]
    full = pack_bitmask(torch.ones(3, 13), pack_mask(torch.ones(3, 13, dtype=torch.bool)))
    parts = [take_rows(packed, 4, 20) for packed in (bitmask, nm)]
    joined = [join_rows([packed, packed]) for packed in (bitmask, nm)]
    wide = pack_nm(torch.randn(4, 48), pack_mask(kept_nm(4, 48, 5, 16)), 5, 16)
    for packed in (bitmask, nm, two_four, full, wide, *nothing, *parts, *joined):
        packed.check()
    listed = replace(nm, shape=[np.int64(ROWS), NARROW], keep_n=np.int32(2), m=np.uint8(4))
    assert listed.shape == (ROWS, NARROW) and (listed.keep_n, listed.m) == (2, 4) and type(listed.m) is int
    for packed in (bitmask, nm, two_four):
        with pytest.raises(ValueError, match="^values: expected tensors with data, got tensors on meta"):
            packed.to("meta").check()


def changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


BITMASK_DATA = [
    (lambda p: {"values": p.values[:-1]}, r"values: expected \d+, as many as bitmask keeps, got \d+"),
    (lambda p: {"values": torch.cat([p.values, p.values[:1]])}, "values: expected"),
    (lambda p: {"bitmask": changed(p.bitmask, (5, 0), 0)}, "values: expected"),
    (lambda p: {"bitmask": changed(p.bitmask, (9, -1), 0x80)}, "bitmask: expected padding bits of 0, got a 1 in row 9"),
    (lambda p: {"row_offsets": p.row_offsets + 1}, "row_offsets: expected .* expected 0, got 1 in row 0"),
    (lambda p: {"row_offsets": changed(p.row_offsets, 7, 1 << 60)}, r"row_offsets: .* got 1152921504606846976 in"),
    (lambda p: {"row_offsets": p.row_offsets.flip(0)}, "row_offsets: expected the sums of the counts"),
    # A column moves from one row to another: the number of values stays.
    (lambda p: {"bitmask": p.bitmask.roll(1, 0)}, "row_offsets: expected the sums of the counts"),
]


@pytest.mark.parametrize(("change", "message"), BITMASK_DATA)
def test_data_of_a_bitmask_that_contradict_each_other(bitmask, change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(bitmask, **change(bitmask)).check()


@pytest.mark.parametrize(
    ("byte", "message"),
    [
        (0b00000111, "a group with 3"),  # in all as many as before
        (0b00110001, "fewer in row 6"),
        (0b01110011, "a group with 3"),
        (0, "fewer in row 6"),
    ],
)
def test_groups_with_another_count(nm, byte, message):
    packed = replace(nm, bitmask=changed(nm.bitmask, (6, 2), byte))
    with pytest.raises(ValueError, match=f"^bitmask: expected exactly 2 kept of every 4, got {message}"):
        packed.check()


def test_padding_bits_of_nm(nm):
    with pytest.raises(ValueError, match="^bitmask: expected padding bits of 0, got a 1 in row 31"):
        replace(nm, bitmask=changed(nm.bitmask, (31, -1), int(nm.bitmask[31, -1]) | 0x10)).check()


@pytest.mark.parametrize("word", [0x0000, 0x4441, 0x5E44, -1, 0x44B4 - 0x8000])
def test_positions_that_do_not_ascend(two_four, word):
    packed = replace(two_four, meta=changed(two_four.meta, (17, 3), word))
    with pytest.raises(ValueError, match=r"^meta: expected two ascending positions .* of the word at \(17, 3\)"):
        packed.check()


def test_reference_names_what_it_cannot_unpack(bitmask, monkeypatch):
    monkeypatch.setenv("LOSA_BACKEND", "reference")
    cut = replace(bitmask, values=bitmask.values[:-1])
    for call in (cut.unpack, lambda: sparse_linear(torch.randn(2, NARROW), cut)):
        with pytest.raises(ValueError, match="^values: expected .* as many as bitmask keeps"):
            call()


def test_made_inside_a_compiled_graph(nm):
    torch.compiler.reset()

    def run(x):
        half = replace(nm, values=nm.values * 2)
        return sparse_linear(x, half)

    x = torch.randn(3, NARROW)
    with torch.no_grad():
        y = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, run(x))


def test_fake_tensors(bitmask, nm, two_four):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        for packed in (bitmask, nm, two_four):
            fake = replace(packed, **{name: mode.from_tensor(t) for name, t in packed.tensors().items()})
            assert fake.shape == packed.shape
            with pytest.raises(ValueError, match="^values: expected"):
                replace(fake, values=fake.values.bool())


def test_classes_check_themselves_when_made_directly():
    with pytest.raises(ValueError, match="^shape: expected out a multiple of 32"):
        Packed24((16, 64), torch.zeros(16, 32).half(), torch.zeros(16, 4, dtype=torch.int16))
    with pytest.raises(ValueError, match="^values: expected a tensor, got list"):
        PackedBitmask((1, 1), [1.0], torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="^bitmask: expected torch.uint8"):
        PackedNM((1, 4), torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.bool), 2, 4)
