"""Rope: fused into append_kv, many layers in one call, and apply_rope alone, byte for byte."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink import _C, Rope, append_kv, apply_rope, rope_table
from kvlink.cache_ops import APPEND_BACKENDS
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.reference.append_kv import append_kv as reference_append_kv
from kvlink.reference.rope import apply_rope as reference_apply_rope
from kvlink.testing.pools import DTYPES, KINDS, SCALES, make_pool, random_rows
from kvlink.testing.tolerances import assert_same_bits

EXAMPLES = int(os.environ.get("KVLINK_HYPOTHESIS_EXAMPLES", "60"))
INPUTS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def make_rope(
    num_tokens: int, rotary_dim: int, interleaved: bool = False, first_dim: int = 0, seed: int = 0
) -> Rope:
    """Tokens at random positions of a plain table."""
    frequencies = 100.0 ** -np.linspace(0, 1, rotary_dim // 2, endpoint=False)
    table = torch.from_numpy(rope_table(frequencies, 50, factor=1.1))
    positions = np.random.default_rng(seed).integers(0, 50, num_tokens)
    return Rope(table, torch.from_numpy(positions), interleaved, first_dim)


def check_append(
    kind: str, source: torch.dtype, rope: dict[str, int], layers: int | list[int], **shape: object
) -> None:
    ours, expected = (make_pool(kind, num_layers=3, **shape) for _ in range(2))  # type: ignore[arg-type]
    layout = ours.pool.layout
    num_slots = ours.pool.num_pages * layout.page_size
    slots = torch.arange(num_slots)[torch.arange(num_slots) % 7 != 3]
    slots[2::9] = -1
    slots = torch.cat((slots[5:], slots[:4].flip(0)))
    many = () if isinstance(layers, int) else (len(layers),)
    rows = (*many, len(slots), layout.num_kv_heads)
    # NOTE: inf - inf is a NaN of either sign.
    k = random_rows(*rows, layout.head_dim, dtype=source).nan_to_num(posinf=300.0)
    v = random_rows(*rows, layout.head_dim_v, dtype=source, seed=1) if layout.has_v_plane else None
    turning = make_rope(len(slots), **rope)  # type: ignore[arg-type]
    turning.positions[slots < 0] = 999  # not looked at
    append_kv(k, v, ours.pool, layers, slots, rope=turning)
    reference_append_kv(k, v, expected.pool, layers, slots, rope=turning)
    assert ours.bytes() == expected.bytes()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "first_dim"),
    [(128, 128, 0), (80, 32, 0), (64, 48, 16), (36, 34, 2), (8, 2, 3), (576, 64, 512), (2, 2, 0)],
)
def test_every_shape(
    simd_level: str, head_dim: int, rotary_dim: int, first_dim: int, interleaved: bool
) -> None:
    rope = dict(rotary_dim=rotary_dim, first_dim=first_dim, interleaved=interleaved)
    for kind, source in (("nhd", torch.bfloat16), ("strided", torch.float16)):
        check_append(kind, source, rope, [2, 0], head_dim=head_dim, dtype="bfloat16")
    latent = dict(head_dim=head_dim, head_dim_v=head_dim // 2)
    check_append("latent", torch.float32, rope, 1, **latent)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_scale(simd_level: str, dtype: str, scale: str) -> None:
    rope = dict(rotary_dim=24, first_dim=8)
    for i, kind in enumerate(KINDS):
        source = list(INPUTS.values())[i % 3]
        check_append(kind, source, rope, [0, 2], head_dim=40, head_dim_v=16, dtype=dtype,
                     scale=scale)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    head_dim = draw(st.integers(2, 140))
    rotary_dim = 2 * draw(st.integers(1, head_dim // 2))
    check_append(
        draw(st.sampled_from((*KINDS, "latent"))),
        INPUTS[draw(st.sampled_from(sorted(INPUTS)))],
        dict(
            rotary_dim=rotary_dim,
            first_dim=draw(st.integers(0, head_dim - rotary_dim)),
            interleaved=draw(st.booleans()),
            seed=draw(st.integers(0, 9)),
        ),
        draw(st.sampled_from([0, 1, [1], [2, 0], [0, 1, 2]])),
        dtype=draw(st.sampled_from(DTYPES)),
        scale=draw(st.sampled_from(SCALES)),
        num_kv_heads=draw(st.integers(1, 5)),
        head_dim=head_dim,
        head_dim_v=draw(st.integers(1, head_dim)),
        page_size=draw(st.integers(1, 9)),
        num_pages=draw(st.integers(2, 5)),
    )


def test_layers_may_lie_in_any_axis() -> None:
    """Keys as one product for all layers gives them: [tokens, layers, heads, dims]."""
    ours, expected = make_pool("nhd", num_layers=2), make_pool("nhd", num_layers=2)
    both = random_rows(24, 2, 2, 2, 8)
    k, v = both[:, :, 0].transpose(0, 1), both[:, :, 1].transpose(0, 1)
    append_kv(k, v, ours.pool, range(2), torch.arange(24))
    for layer in range(2):
        append_kv(k[layer], v[layer], expected.pool, layer, torch.arange(24))
    assert ours.bytes() == expected.bytes()


def test_any_number_of_threads() -> None:
    k, slots = random_rows(3, 700, 2, 64), torch.randperm(704)[:700]
    rope = make_rope(700, 64)
    threads, results = _C.num_threads(), []
    try:
        for count in (1, 2, 5):
            _C.set_num_threads(count)
            filled = make_pool("nhd", num_layers=3, head_dim=64, page_size=16, num_pages=44)
            append_kv(k, k, filled.pool, range(3), slots, rope=rope)
            results.append(filled.bytes())
    finally:
        _C.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", INPUTS.values())
def test_apply_rope(simd_level: str, dtype: torch.dtype, interleaved: bool) -> None:
    for num_tokens, head_dim, rotary_dim in ((0, 8, 8), (5, 128, 128), (300, 70, 44)):
        rope = make_rope(num_tokens, rotary_dim, interleaved, first_dim=head_dim - rotary_dim)
        q = torch.randn(num_tokens, 3, head_dim).to(dtype)
        expected = reference_apply_rope(q.float(), rope).to(dtype)
        assert_same_bits(apply_rope(q, rope), expected)
        heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
        assert apply_rope(heads_first, rope, out=q) is q
        assert_same_bits(q, expected)
        again = heads_first.numpy() if dtype == torch.float32 else heads_first
        turned = apply_rope(again, rope, out=again)  # in place
        assert_same_bits(torch.as_tensor(turned), expected)


def test_a_pair_turns_by_its_angle() -> None:
    angle = 0.5
    table = rope_table([angle], 4)
    x = torch.tensor([[[1.0, 0.0]]])
    turned = apply_rope(x, Rope(table, np.array([3])))
    np.testing.assert_allclose(turned[0, 0], [np.cos(1.5), np.sin(1.5)], rtol=1e-6)
    twice = torch.from_numpy(rope_table([0.1, 0.2], 9, factor=2.0))
    torch.testing.assert_close(twice[8, 1], 2 * torch.tensor(1.6).cos())
    torch.testing.assert_close(twice[8, 2], 2 * torch.tensor(0.8).sin())


def test_refusals() -> None:
    filled = make_pool("nhd", num_layers=2)
    before = filled.bytes()
    k, slots, rope = torch.ones(3, 2, 8), torch.tensor([1, -1, 2]), make_rope(3, 8)

    def refuses(match: str, layer: object = 0, k: torch.Tensor = k, **changes: object) -> None:
        with pytest.raises(InvalidArgument, match=match):
            append_kv(k, k, filled.pool, layer, slots, rope=rope._replace(**changes))  # type: ignore[arg-type]

    refuses("even number of columns; got 7", cos_sin=torch.zeros(50, 7))
    refuses(r"within the 8 of a head; got 2 to 9", first_dim=2)
    refuses(r"within the 8 of a head; got -1 to 6", first_dim=-1)
    refuses(r"rope.positions\[2\]: .* 0 to 49; got 50", positions=torch.tensor([0, 99, 50]))
    refuses("rope.positions: expected num_tokens = 3", positions=torch.tensor([0]))
    refuses("rope.positions: expected dtype int64", positions=torch.zeros(3).int())
    refuses("rope.cos_sin: expected dtype float32", cos_sin=torch.zeros(50, 8).double())
    refuses("layer: expected 0 to 1; got 2", layer=[0, 2], k=torch.ones(2, 3, 2, 8))
    refuses("distinct stored layers", layer=[1, 1], k=torch.ones(2, 3, 2, 8))
    refuses("k: expected num_layers = 2 as in layer; got 3", layer=[0, 1], k=torch.ones(3, 3, 2, 8))
    refuses(r"k: expected shape \[num_layers, num_tokens", layer=[0, 1])
    refuses(r"k: expected shape \[num_tokens", k=torch.ones(1, 3, 2, 8))
    assert filled.bytes() == before
    with pytest.raises(InvalidArgument, match="positions"):
        apply_rope(k, rope._replace(positions=torch.tensor([0, 1, -1])))
    with pytest.raises(Unsupported, match="float64"):
        apply_rope(k.double(), rope)


def test_backends_declare_it() -> None:
    features = {backend.name: backend.features for backend in APPEND_BACKENDS}
    assert features["cpu"] == {"rope", "layers"}
    assert features["cuda"] == {"rope", "layers"}
