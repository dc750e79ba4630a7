"""KVLayout: its C++ twin, its geometry and its canonical bytes (docs/kv_layout.md)."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvlink import _C, KVLayout, KVPool, Shard
from kvlink.errors import InvalidArgument
from kvlink.layout import DTYPE_BYTES, DTYPES, FORMS, LAYOUT_BYTES, SCALES, Plane

EXAMPLES = int(os.environ.get("KVLINK_HYPOTHESIS_EXAMPLES", "100"))
VALUE_DTYPES = DTYPES[:-1]
DOC = Path(__file__).parents[1] / "docs" / "kv_layout.md"
strides = st.integers(0, 2**48 - 1)
planes = st.builds(Plane, strides, strides, strides, strides, strides)


@st.composite
def made_layouts(draw: st.DrawFn) -> KVLayout:
    """Layouts as the class methods make them, small enough to look at every byte."""
    kind = draw(st.sampled_from(("nhd", "hnd", "packed", "packed_hnd", "latent", "opaque")))
    dtype = draw(st.sampled_from(VALUE_DTYPES))
    scale = draw(st.sampled_from(SCALES))
    head_dim = draw(st.integers(1, 9))
    page_size = draw(st.integers(1, 5))
    if kind == "opaque":
        return KVLayout.opaque(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)), dtype)
    if kind == "latent":
        head_dim_v = draw(st.integers(1, head_dim))
        return KVLayout.latent(
            head_dim=head_dim, head_dim_v=head_dim_v, page_size=page_size, dtype=dtype, scale=scale
        )
    args = dict(
        num_kv_heads=draw(st.integers(1, 4)), head_dim=head_dim, page_size=page_size, dtype=dtype,
        head_dim_v=draw(st.integers(1, 9)), scale=scale,
    )  # fmt: skip
    if kind == "packed_hnd":
        return KVLayout.packed(order="hnd", **args)  # type: ignore[arg-type]
    layout: KVLayout = getattr(KVLayout, kind)(**args)
    return layout


@st.composite
def engine_layouts(draw: st.DrawFn) -> KVLayout:
    """Layouts read off tensors whose axes lie in any order, with gaps between them."""
    axes = draw(st.permutations(("kv", "page", "slot", "head", "dim")))
    size = {axis: draw(st.integers(1, 4)) for axis in ("slot", "head", "dim")}
    size |= {"kv": 2, "page": 3}
    gaps = [draw(st.integers(0, 2)) for _ in axes]
    base = torch.empty([size[a] + g for a, g in zip(axes, gaps, strict=True)], dtype=torch.float16)
    tensor = base[tuple(slice(0, size[a]) for a in axes)]
    return KVLayout.from_tensor(tensor, " ".join(axes))


@st.composite
def any_layouts(draw: st.DrawFn) -> KVLayout:
    """Anything the dataclass accepts, strides up to the limit."""
    form = draw(st.sampled_from(FORMS))
    head_dim = draw(st.integers(1, 2**20))
    opaque = form == "opaque"
    return KVLayout(
        form, draw(st.sampled_from(DTYPES if opaque else VALUE_DTYPES)),
        "none" if opaque else draw(st.sampled_from(SCALES)), draw(st.integers(1, 2**20)), head_dim,
        0 if opaque else draw(st.integers(1, head_dim)), draw(st.integers(1, 2**20)),
        *(draw(planes) for _ in range(4)),
    )  # fmt: skip


def coordinates(layout: KVLayout, num_pages: int) -> itertools.product[tuple[int, ...]]:
    return itertools.product(range(num_pages), range(layout.page_size), range(layout.num_kv_heads))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    any_layouts() | made_layouts() | engine_layouts(),
    st.integers(0, 2**15), st.integers(0, 2**12), st.integers(0, 2**12), st.integers(0, 2**12),
)  # fmt: skip
def test_both_languages_agree_on_offsets(
    layout: KVLayout, page: int, slot: int, head: int, dim: int
) -> None:
    twin = _C.Layout(layout.to_bytes())
    for at in ((page, slot, head, dim), (2**31 - 1, 0, 0, 0), (0, 0, 0, 0)):
        assume(layout.k_offset(*at) < 2**63 and layout.v_offset(*at) < 2**63)
        assume(layout.k_scale_offset(*at[:3]) < 2**63 and layout.v_scale_offset(*at[:3]) < 2**63)
        assert twin.k_offset(*at) == layout.k_offset(*at)
        assert twin.v_offset(*at) == layout.v_offset(*at)
        assert twin.k_scale_offset(*at[:3]) == layout.k_scale_offset(*at[:3])
        assert twin.v_scale_offset(*at[:3]) == layout.v_scale_offset(*at[:3])


def test_offsets_are_64_bit() -> None:
    layout = KVLayout.nhd(num_kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16")
    page = 2**31 - 1
    expected = page * 16 * 8 * 128 * 2 * 2 + 16 * 8 * 128 * 2  # behind K of the last page
    assert layout.v_offset(page, 0, 0, 0) == expected > 2**46
    assert _C.Layout(layout.to_bytes()).v_offset(page, 0, 0, 0) == expected


@settings(max_examples=EXAMPLES, deadline=None)
@given(made_layouts() | engine_layouts(), st.integers(1, 3))
def test_no_byte_is_shared_and_none_is_outside(layout: KVLayout, num_pages: int) -> None:
    uses = np.zeros(layout.layer_bytes(num_pages), dtype=np.int32)
    twin = _C.Layout(layout.to_bytes())

    def use(offset: int, size: int) -> None:
        assert 0 <= offset <= len(uses) - size
        uses[offset : offset + size] += 1

    for page, slot, head in coordinates(layout, num_pages):
        for dim in range(layout.head_dim):
            use(twin.k_offset(page, slot, head, dim), layout.element_bytes)
        for dim in range(layout.head_dim_v if layout.has_v_plane else 0):
            use(twin.v_offset(page, slot, head, dim), layout.element_bytes)
        if layout.scale == "token_head":
            use(twin.k_scale_offset(page, slot, head), 4)
            if layout.has_v_plane:
                use(twin.v_scale_offset(page, slot, head), 4)
    if layout.scale in ("tensor", "head"):
        for head in range(layout.num_kv_heads if layout.scale == "head" else 1):
            for page, slot in ((0, 0), (num_pages - 1, layout.page_size - 1)):
                assert twin.k_scale_offset(page, slot, head) == twin.k_scale_offset(0, 0, head)
                assert twin.v_scale_offset(page, slot, head) == twin.v_scale_offset(0, 0, head)
            use(twin.k_scale_offset(0, 0, head), 4)
            if layout.has_v_plane:
                use(twin.v_scale_offset(0, 0, head), 4)
    assert uses.max() == 1
    rows = num_pages * layout.page_size
    static = {"tensor": 1, "head": layout.num_kv_heads}.get(layout.scale, 0)
    assert uses.sum() == rows * layout.token_bytes() + 4 * static * (2 if layout.has_v_plane else 1)


@pytest.mark.parametrize("scale", SCALES)
def test_latent_v_is_the_front_of_k(scale: str) -> None:
    layout = KVLayout.latent(head_dim=7, head_dim_v=4, page_size=3, dtype="int8", scale=scale)
    assert not layout.has_v_plane
    for dim in range(layout.head_dim_v):
        assert layout.v_offset(1, 0, 0, dim) == layout.k_offset(1, 0, 0, dim)
    assert layout.k_scale == layout.v_scale


@given(made_layouts())
def test_pages_of_made_layouts_are_aligned(layout: KVLayout) -> None:
    for page in range(3):
        assert layout.k_offset(page, 0, 0, 0) % 16 == 0
    if layout.has_scales:
        assert layout.k_scale_offset(1, 0, 0) % 4 == layout.v_scale_offset(1, 0, 0) % 4 == 0


def test_layers_of_a_pool_lie_one_after_another() -> None:
    layout = KVLayout.hnd(
        num_kv_heads=3, head_dim=40, page_size=5, dtype="int8", scale="token_head"
    )
    pool = KVPool.create(layout, num_layers=3, num_pages=7)
    assert pool.segment is not None
    stride = -(-layout.layer_bytes(7) // 4096) * 4096
    for layer in range(3):
        address = torch.from_dlpack(pool.v(layer)).data_ptr()
        assert address == pool.segment.address + layer * stride + layout.v.offset_bytes
    assert pool.segment.num_bytes >= 3 * stride


# --- canonical bytes ------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(any_layouts() | made_layouts() | engine_layouts())
def test_round_trip_in_both_languages(layout: KVLayout) -> None:
    data = layout.to_bytes()
    assert len(data) == LAYOUT_BYTES == 188
    assert KVLayout.from_bytes(data) == layout
    assert _C.Layout(data).to_bytes() == data
    assert layout.fingerprint == hashlib.sha256(data).hexdigest()[:32]


@settings(max_examples=EXAMPLES, deadline=None)
@given(any_layouts(), any_layouts())
def test_fingerprints_tell_layouts_apart(a: KVLayout, b: KVLayout) -> None:
    assert (a.fingerprint == b.fingerprint) == (a == b)


LAYOUT = KVLayout.packed(num_kv_heads=2, head_dim=4, page_size=3, dtype="int8", scale="token_head")


@pytest.mark.parametrize(
    ("offset", "format_", "value", "match"),
    [
        (0, "4s", b"KVLX", "magic"),
        (4, "H", 0, "version: expected 1; got 0"),
        (4, "H", 2, "version: expected 1; got 2"),
        (6, "B", 4, "form: expected < 4; got 4"),
        (7, "B", 7, "dtype: expected < 7; got 7"),
        (8, "B", 255, "scale: expected < 4; got 255"),
        (12, "i", 0, "num_kv_heads"),
        (16, "i", -1, "head_dim"),
        (20, "i", -5, "head_dim_v"),
        (20, "i", 0, "head_dim_v"),
        (24, "i", 0, "page_size"),
        (28, "q", -1, r"2\^48"),
        (28 + 40 * 3 + 32, "q", 2**48, r"2\^48"),
    ],
)
def test_malformed_bytes_are_refused(offset: int, format_: str, value: object, match: str) -> None:
    data = bytearray(LAYOUT.to_bytes())
    struct.pack_into("<" + format_, data, offset, value)
    for read in (KVLayout.from_bytes, _C.Layout):
        with pytest.raises(InvalidArgument, match=match):
            read(bytes(data))


@pytest.mark.parametrize("at", [9, 10, 11])
def test_reserved_bytes_are_zero(at: int) -> None:
    data = bytearray(LAYOUT.to_bytes())
    data[at] = 1
    with pytest.raises(InvalidArgument, match="reserved"):
        KVLayout.from_bytes(bytes(data))
    with pytest.raises(InvalidArgument, match="reserved"):
        _C.Layout(bytes(data))


@given(st.binary(max_size=400))
def test_other_bytes_are_refused(data: bytes) -> None:
    assume(data[:4] != b"KVLY")
    for read in (KVLayout.from_bytes, _C.Layout):
        with pytest.raises(InvalidArgument):
            read(data)


def test_latent_v_cannot_exceed_k_in_either_language() -> None:
    layout = KVLayout.latent(head_dim=8, head_dim_v=4, page_size=2, dtype="float16")
    data = bytearray(layout.to_bytes())
    struct.pack_into("<i", data, 20, 9)
    for read in (KVLayout.from_bytes, _C.Layout):
        with pytest.raises(InvalidArgument, match="head_dim_v"):
            read(bytes(data))


# --- the document ---------------------------------------------------------------------------


def test_the_documents_example_is_true() -> None:
    """The serialised example in docs/kv_layout.md is what to_bytes gives."""
    text = DOC.read_text()
    block = re.search(r"```hex\n(.*?)```", text, re.DOTALL)
    assert block is not None
    written = bytes.fromhex(re.sub(r"#.*", "", block.group(1)))
    layout = KVLayout.nhd(num_kv_heads=2, head_dim=64, page_size=4, dtype="bfloat16")
    assert written == layout.to_bytes()
    assert layout.fingerprint in text


def test_shards() -> None:
    shard = Shard([3, 1], range(2, 4))
    assert (shard.layers, shard.kv_heads) == ((3, 1), range(2, 4))
    for layers, heads in (([], [0]), ([1, 1], [0]), ([-1], [0]), ([0], []), ([0], [0, 2])):
        with pytest.raises(InvalidArgument):
            Shard(layers, heads)
    assert set(DTYPE_BYTES) == set(DTYPES)


def test_dimensions_may_be_numpy_integers() -> None:
    dims = {"num_kv_heads": 2, "head_dim": 64, "page_size": 16}
    plain = KVLayout.nhd(**dims, dtype="float16")
    numpy = KVLayout.nhd(**{name: np.int64(size) for name, size in dims.items()}, dtype="float16")
    assert numpy == plain
    assert numpy.fingerprint == plain.fingerprint
