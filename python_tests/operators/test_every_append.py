"""append_kv of every backend, byte for byte the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from places import Place, assert_same_bytes

from kvlink import Rope, append_kv, rope_table
from kvlink.errors import InvalidArgument, Unsupported
from kvlink.reference.append_kv import append_kv as reference_append_kv
from kvlink.testing.pools import DTYPES, KINDS, SCALES, make_pool, random_rows

SOURCES = (torch.float32, torch.float16, torch.bfloat16)
# head_dim, rotary_dim, first_dim: all dims turn, or some; groups of 8 begin in the middle of pairs.
ROTARIES = [(128, 128, 0), (80, 32, 0), (64, 48, 16), (36, 34, 2), (8, 2, 3), (72, 16, 40)]


def make_rope(num_tokens: int, rotary_dim: int, interleaved: bool, first_dim: int) -> Rope:
    table = torch.from_numpy(rope_table(0.7 ** np.arange(rotary_dim // 2), 50, factor=1.1))
    positions = np.random.default_rng(0).integers(0, 50, num_tokens)
    return Rope(table, torch.from_numpy(positions), interleaved, first_dim)


def check(
    place: Place, kind: str, source: torch.dtype, layers: int | list[int] = 0, seed: int = 0,
    rope: dict[str, Any] | None = None, num_layers: int = 3, **shape: Any,
) -> None:  # fmt: skip
    shape = dict(head_dim=24, head_dim_v=16, num_layers=num_layers) | shape
    ours, expected = (make_pool(kind, seed=seed, **shape) for _ in range(2))
    layout = ours.pool.layout
    slots = torch.from_numpy(np.random.default_rng(seed).permutation(24)[:19]).long()
    slots[3] = -1
    rows = (*(() if isinstance(layers, int) else (len(layers),)), 19, layout.num_kv_heads)
    # NOTE: in a rope, inf - inf is a NaN of either sign.
    k = random_rows(*rows, layout.head_dim, dtype=source, seed=seed)
    k = k if rope is None else k.nan_to_num(posinf=300.0)
    v = random_rows(*rows, layout.head_dim_v, dtype=source, seed=seed + 1)
    values = v if layout.has_v_plane else None
    turning = None if rope is None else make_rope(19, **rope)
    if turning is not None:
        turning.positions[3] = 999  # not looked at
    pool = place.put(ours.pool)
    append_kv(
        place.put(k), place.put(values), pool, layers, place.put(slots), rope=place.put(turning),
        backend=place.backend,
    )  # fmt: skip
    reference_append_kv(k, values, expected.pool, layers, slots, rope=turning)
    assert_same_bytes(place, pool, ours, expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_scale(place: Place, dtype: str, scale: str) -> None:
    for i, kind in enumerate((*KINDS, "latent")):
        check(place, kind, SOURCES[i % 3], seed=i, dtype=dtype, scale=scale, num_layers=1)
    rope = dict(rotary_dim=16, first_dim=4, interleaved=scale == "head")
    check(place, "hnd", SOURCES[len(scale) % 3], [2, 0], rope=rope, dtype=dtype, scale=scale)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "first_dim"), ROTARIES)
def test_rope(
    place: Place, head_dim: int, rotary_dim: int, first_dim: int, interleaved: bool
) -> None:
    rope = dict(rotary_dim=rotary_dim, first_dim=first_dim, interleaved=interleaved)
    shape = dict(head_dim=head_dim, head_dim_v=head_dim // 2, num_layers=1)
    check(place, "nhd", torch.bfloat16, rope=rope, dtype="bfloat16", **shape)
    check(place, "strided", torch.float16, rope=rope, dtype="float32", **shape)
    check(place, "latent", torch.float32, rope=rope, dtype="float8_e4m3", scale="token_head",
          **shape)  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "latent"])
def test_many_layers(place: Place, kind: str) -> None:
    """More than one launch takes, in an order of their own."""
    layers = [(7 * i) % 83 for i in range(83)]
    rope = dict(rotary_dim=8, first_dim=0, interleaved=False)
    for turning in (None, rope):
        check(place, kind, torch.bfloat16, layers, rope=turning, num_layers=83, dtype="bfloat16",
              head_dim=8, head_dim_v=8)  # fmt: skip


def test_any_strides(place: Place) -> None:
    """Heads outside of tokens; a part of a fused projection; layers along any axis."""
    both = random_rows(24, 2, 2, 2, 8)
    k, v = both[:, :, 0].transpose(0, 1), both[:, :, 1].transpose(0, 1)
    ours, expected = make_pool("nhd", num_layers=2), make_pool("nhd", num_layers=2)
    pool, slots = place.put(ours.pool), torch.arange(24)
    append_kv(place.put(k), place.put(v), pool, [1, 0], place.put(slots), backend=place.backend)
    reference_append_kv(k.cpu(), v.cpu(), expected.pool, [1, 0], slots)
    assert_same_bytes(place, pool, ours, expected)


def test_refusals(place: Place) -> None:
    filled = make_pool("nhd", num_layers=2)
    before = filled.bytes()
    pool, k = place.put(filled.pool), place.put(torch.ones(3, 2, 8))
    slots, rope = place.put(torch.arange(3)), make_rope(3, 8, False, 0)

    def refuses(match: str, layer: object = 0, k: Any = k, **changes: object) -> None:
        turning = place.put(rope._replace(**changes))
        with pytest.raises(InvalidArgument, match=match):
            append_kv(k, k, pool, layer, slots, rope=turning, backend=place.backend)  # type: ignore[arg-type]

    refuses("even number of columns; got 7", cos_sin=torch.zeros(50, 7))
    refuses("within the 8 of a head; got 2 to 9", first_dim=2)
    refuses("within the 8 of a head; got -1 to 6", first_dim=-1)
    refuses("layer: expected 0 to 1; got 2", layer=[0, 2], k=place.put(torch.ones(2, 3, 2, 8)))
    refuses("k: expected num_layers = 2", layer=[0, 1], k=place.put(torch.ones(3, 3, 2, 8)))
    opaque = place.put(make_pool("opaque").pool)
    with pytest.raises(Unsupported, match="opaque"):
        append_kv(place.put(torch.ones(3, 1, 8)), None, opaque, 0, slots, backend=place.backend)
    assert filled.bytes() == before
