"""The CUDA kernels of paged_attention and merge_states, run by emulation, against the reference.
test_attention_cuda.py has the same on a device."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_attention_cases import BFLOAT16, EVERYTHING, FLOAT32, RAGGED, every_case
from emulated import SEEDS, DeviceArray, Emulation, emulated_cuda, pool_on_device

import kvlink
from kvlink import attention
from kvlink.attention import choose_backend
from kvlink.errors import InvalidArgument, NotReady, PageTableError, Unsupported
from kvlink.reference.append_kv import plane
from kvlink.reference.merge_states import merge_states as merge_reference
from kvlink.reference.paged_attention import paged_attention as reference
from kvlink.testing.cases import AttentionCase, device_slack, make_attention, starts
from kvlink.testing.tolerances import assert_close, assert_same_bits

__all__ = ["emulated_cuda"]


@pytest.fixture(autouse=True)
def _not_of_sm90(emulated_cuda: Emulation) -> None:
    """Its kernel for long prompts is tested in test_attention_sm90_emulated.py."""
    emulated_cuda.major_version(8)


# In emulation a graph is captured there: memory between kernels is the call's own, of its exact
# size and full of NaN at first.
CAPTURED = 0xCA9


def on_device(value: Any) -> Any:
    return DeviceArray(value) if isinstance(value, torch.Tensor) else value


def attend(args: Any, kwargs: dict[str, Any], **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, pool, layer, page_table, seq_lens = args
    arrays = [DeviceArray(each) for each in (page_table.contiguous(), seq_lens)]
    out, lse = kvlink.paged_attention(
        DeviceArray(q), pool_on_device(pool), layer, *arrays, return_lse=True, backend="cuda",
        **more, **{name: on_device(value) for name, value in kwargs.items()},
    )  # fmt: skip
    return out.tensor, lse.tensor


def check_bad_entries(emulated_cuda: Emulation, case: AttentionCase) -> None:
    """Of two sequences the first gets bad entries: they are told, and the second is as ever."""
    inputs = make_attention(case)
    q, pool, layer, page_table, seq_lens = inputs.args
    rows = case.q_lens[0]
    good, _ = attend(inputs.args, inputs.kwargs)
    for bad in (-1, pool.num_pages, 2**31 - 1):
        table = page_table.clone()
        table[0, 1] = bad
        out, _ = attend((q, pool, layer, table, seq_lens), inputs.kwargs)
        with pytest.raises(PageTableError, match=rf"page_table\[1\].*got {bad}"):
            emulated_cuda.check_errors()
        assert bool(out.isfinite().all())
        assert_same_bits(out[rows:], good[rows:])
    lens = seq_lens.clone()
    lens[0] = 10**6
    out, lse = attend((q, pool, layer, page_table, lens), inputs.kwargs)
    with pytest.raises(InvalidArgument, match=r"seq_lens\[0\].*got 1000000"):
        emulated_cuda.check_errors()
    assert bool((out[:rows] == 0).all())
    assert bool((lse[:rows] == float("-inf")).all())
    assert_same_bits(out[rows:], good[rows:])


@every_case
def test_against_the_reference(emulated_cuda: Emulation, case: AttentionCase) -> None:
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    assert bool(expected.isfinite().all()), "the case leaks poison"
    emulated_cuda.seed(1 + case.head_dim)
    out, lse = attend(inputs.args, inputs.kwargs, stream=CAPTURED)
    emulated_cuda.check_errors()
    assert_close(out, expected, slack=device_slack(case))
    assert_close(lse, expected_lse, "lse")


@pytest.mark.parametrize("dtypes", [BFLOAT16, FLOAT32], ids=lambda each: each["kv_dtype"])
@pytest.mark.parametrize("q_lens", [(1, 1, 1), (3, 1, 20)])
def test_the_schedule_does_not_matter(
    emulated_cuda: Emulation, q_lens: tuple[int, ...], dtypes: dict[str, Any]
) -> None:
    inputs = make_attention(
        AttentionCase(q_lens=q_lens, seq_lens=(530, 40, 133), **dtypes, **EVERYTHING)
    )
    results = []
    for seed in SEEDS:
        emulated_cuda.seed(seed)
        results.append(attend(inputs.args, inputs.kwargs))
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1], "lse")


def test_many_sequences_are_counted_by_every_block(emulated_cuda: Emulation) -> None:
    """More than a block has threads, some of many splits, some that see nothing."""
    lens = [(7 * seq) % 30 for seq in range(300)]
    lens[40] = lens[41] = lens[299] = 1025
    case = AttentionCase(
        q_lens=(1,) * 300, seq_lens=tuple(lens), num_q_heads=1, num_kv_heads=1, head_dim=16,
        **BFLOAT16,
    )  # fmt: skip
    inputs = make_attention(case)
    expected, expected_lse = reference(*inputs.args, **inputs.kwargs)
    for stream in (CAPTURED, 0):
        emulated_cuda.seed(stream + 3)
        out, lse = attend(inputs.args, inputs.kwargs, stream=stream)
        emulated_cuda.check_errors()
        assert_close(out, expected, slack=device_slack(case))
        assert_close(lse, expected_lse, "lse")


def test_calls_on_a_stream_share_memory_between_kernels(emulated_cuda: Emulation) -> None:
    """Of other sizes each time, with what the one before left there."""
    for lens in ((600, 3), (1030,), (40, 530, 2000), (600, 3), (1,)):
        case = AttentionCase(q_lens=(1,) * len(lens), seq_lens=lens, **BFLOAT16)
        inputs = make_attention(case)
        alone = attend(inputs.args, inputs.kwargs, stream=CAPTURED)
        for stream in (0, 5, 0):
            again = attend(inputs.args, inputs.kwargs, stream=stream)
            assert_same_bits(again[0], alone[0])
            assert_same_bits(again[1], alone[1], "lse")


KEPT, KEPT_FOR_GOOD = 32, 4  # streams of a device whose memory is kept; the first of them


def test_memory_of_streams_that_are_gone_is_used_again(emulated_cuda: Emulation) -> None:
    inputs = make_attention(AttentionCase(q_lens=(1, 1), seq_lens=(600, 3), **BFLOAT16))
    alone = attend(inputs.args, inputs.kwargs, stream=CAPTURED)

    def call(stream: int) -> None:
        out, lse = attend(inputs.args, inputs.kwargs, stream=stream)
        assert_same_bits(out, alone[0])
        assert_same_bits(lse, alone[1], "lse")

    before, live = emulated_cuda.allocations()
    first = 10_000  # no other test's
    for stream in range(first, first + KEPT):
        call(stream)
    last = first + 4 * KEPT
    for stream in range(first + KEPT, last + 1):
        call(stream)
    made, kept = emulated_cuda.allocations()
    assert made - before <= KEPT
    assert kept - live <= KEPT
    # The stream used longest ago is not done: its memory is its own, and others have their call's.
    oldest = last - (KEPT - KEPT_FOR_GOOD) + 1
    emulated_cuda.busy(oldest, True)
    for more in (1, 2):
        call(last + more)
        assert emulated_cuda.allocations() == (made + more, kept)
    call(oldest)  # which is the last one now
    call(last + 3)  # takes the place of the next
    emulated_cuda.busy(oldest, False)
    call(oldest)
    assert emulated_cuda.allocations() == (made + 2, kept)


def test_streams_used_by_threads_at_once(emulated_cuda: Emulation) -> None:
    """More of them than have memory kept: nobody gets what another is using."""
    inputs = make_attention(AttentionCase(q_lens=(1,), seq_lens=(600,), **BFLOAT16))
    alone, _ = attend(inputs.args, inputs.kwargs, stream=CAPTURED)
    wrong: list[int] = []

    def run(first: int) -> None:
        for stream in range(first, first + KEPT):
            out, _ = attend(inputs.args, inputs.kwargs, stream=stream)
            if not torch.equal(out.view(torch.int16), alone.view(torch.int16)):
                wrong.append(stream)

    threads = [threading.Thread(target=run, args=(20_000 + 16 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong


def test_the_batch_does_not_matter(emulated_cuda: Emulation) -> None:
    for q_lens, seq_lens in (((1, 1, 1), (1100, 65, 700)), ((1, 7, 30), (300, 65, 100))):
        inputs = make_attention(AttentionCase(q_lens=q_lens, seq_lens=seq_lens, **BFLOAT16))
        q, pool, layer, page_table, lens = inputs.args
        out, lse = attend(inputs.args, inputs.kwargs)
        indptr = starts(q_lens).tolist()
        for order in ([1], [2, 0], [2, 1, 0, 1]):
            rows = torch.cat([torch.arange(indptr[seq], indptr[seq + 1]) for seq in order])
            kwargs = dict(inputs.kwargs)
            if "q_indptr" in kwargs:
                kwargs["q_indptr"] = starts([q_lens[seq] for seq in order])
            again = attend((q[rows], pool, layer, page_table[order], lens[order]), kwargs)
            assert_same_bits(again[0], out[rows])
            assert_same_bits(again[1], lse[rows], "lse")


def test_bad_entries_are_never_used_and_reported_later(emulated_cuda: Emulation) -> None:
    for q_lens in ((1, 1, 1), (2, 1, 1)):
        case = AttentionCase(q_lens=q_lens, seq_lens=(20, 40, 33), csr=False, **BFLOAT16)
        inputs = make_attention(case)
        q, pool, layer, page_table, seq_lens = inputs.args
        good, _ = attend(inputs.args, inputs.kwargs)
        for bad in (-1, pool.num_pages, 2**31 - 1):
            table = page_table.clone()
            table[1, 1] = bad
            out, _ = attend((q, pool, layer, table, seq_lens), inputs.kwargs)
            entry = page_table.shape[1] + 1
            with pytest.raises(PageTableError, match=rf"page_table\[{entry}\].*got {bad}"):
                emulated_cuda.check_errors()
            assert bool(out.isfinite().all())
            others = [row for row in range(len(q)) if row != q_lens[0]]
            assert_same_bits(out[others], good[others])
        for bad in (-5, 16 * page_table.shape[1] + 1):
            lens = seq_lens.clone()
            lens[1] = bad
            out, lse = attend((q, pool, layer, page_table, lens), inputs.kwargs)
            with pytest.raises(InvalidArgument, match=rf"seq_lens\[1\].*got {bad}"):
                emulated_cuda.check_errors()
            assert bool((out[q_lens[0]] == 0).all())
            assert bool((lse[q_lens[0]] == float("-inf")).all())
    inputs = make_attention(
        AttentionCase(q_lens=(1,) * 6, seq_lens=(600,) * 6, csr=True, **BFLOAT16)
    )
    pages = int(inputs.kwargs["page_indptr"][-1])
    twice = torch.tensor([0, pages, 0, pages, 0, pages, 0], dtype=torch.int32)
    args = (*inputs.args[:4], torch.full((6,), 16 * pages, dtype=torch.int32))
    out, _ = attend(args, inputs.kwargs | {"page_indptr": twice}, stream=CAPTURED)
    with pytest.raises(InvalidArgument, match=r"q_indptr or page_indptr\[2\].*got 0"):
        emulated_cuda.check_errors()
    assert bool((out == 0).all())
    inputs = make_attention(AttentionCase(**RAGGED, csr=True, **BFLOAT16))
    for name, bad in (("page_indptr", 10**6), ("q_indptr", -3)):
        kwargs = {**inputs.kwargs, name: inputs.kwargs[name].clone()}
        kwargs[name][2] = bad
        attend(inputs.args, kwargs)
        with pytest.raises(InvalidArgument, match=rf"q_indptr or page_indptr\[2\].*got {bad}"):
            emulated_cuda.check_errors()


def test_walking_splits_gives_the_bits_of_folding_them_later(emulated_cuda: Emulation) -> None:
    """Ten tiles of a sequence walk its splits; the last rows alone go split by split."""
    for latent, dtypes in ((False, BFLOAT16), (True, BFLOAT16), (False, FLOAT32), (True, FLOAT32)):
        sizes: dict[str, Any] = dict(num_kv_heads=1, head_dim=32, head_dim_v=32)
        short = latent or dtypes is FLOAT32
        tokens, heads, length = (66, 8, 520) if short else (74, 8, 1030)
        case = AttentionCase(
            q_lens=(tokens,), seq_lens=(length,), num_q_heads=heads, window=length - 20,
            form="latent" if latent else "nhd", **(dtypes | sizes),
        )  # fmt: skip
        inputs = make_attention(case)
        q, *rest = inputs.args
        out, lse = attend(inputs.args, inputs.kwargs)
        expected, _ = reference(*inputs.args, **inputs.kwargs)
        assert_close(out, expected, slack=device_slack(case))
        last = {**inputs.kwargs, "q_indptr": starts((5,))}
        again, again_lse = attend((q[-5:], *rest), last)
        assert_same_bits(again, out[-5:])
        assert_same_bits(again_lse, lse[-5:], "lse")


@pytest.mark.parametrize("kind", ["halves", "bytes", "floats", "latent", "latent-floats", "mask"])
def test_what_a_row_does_not_see_stays_out_of_it(emulated_cuda: Emulation, kind: str) -> None:
    """NaN and infinities in K and V of later tokens, and of hidden ones, reach nobody else."""
    case = AttentionCase(
        q_lens=(9, 1), seq_lens=(40, 70), form="latent" if "latent" in kind else "nhd",
        num_kv_heads=1, q_dtype="bfloat16", mask="tree" if kind == "mask" else None,
        kv_dtype=dict(bytes="float8_e5m2", floats="float32").get(kind.split("-")[-1], "bfloat16"),
    )  # fmt: skip
    inputs = make_attention(case)
    _, pool, layer, page_table, _ = inputs.args
    clean, _ = attend(inputs.args, inputs.kwargs)
    clean_slack = device_slack(case)
    for value in (float("nan"), float("inf")):
        position = 36  # the sixth of the new tokens of the first sequence
        page = int(page_table[0, position // case.page_size])
        v = torch.from_dlpack(plane(pool, layer, "v"))
        before = v[page, position % case.page_size].clone()
        v[page, position % case.page_size, :, 3::5] = value
        expected, _ = reference(*inputs.args, **inputs.kwargs)
        out, _ = attend(inputs.args, inputs.kwargs)
        assert not bool(expected.isfinite().all())
        # An infinity that is seen may come out as NaN.
        assert torch.equal(out.isfinite(), expected.isfinite())
        slack = None if clean_slack is None else torch.where(expected.isfinite(), clean_slack, 0)
        assert_close(out.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0), slack=slack)
        unaffected = [row for row in range(10) if bool(expected[row].isfinite().all())]
        assert len(unaffected) >= 4
        assert_same_bits(out[unaffected], clean[unaffected])
        v[page, position % case.page_size] = before


def test_pages_of_another_generation_are_reported(emulated_cuda: Emulation) -> None:
    for q_lens, csr in (((1, 1), False), ((3, 1), True)):
        case = AttentionCase(
            q_lens=q_lens, seq_lens=(40, 33), generations=True, csr=csr, **BFLOAT16
        )
        inputs = make_attention(case)
        page_table = inputs.args[3]
        attend(inputs.args, inputs.kwargs)
        emulated_cuda.check_errors()
        page = int(page_table[2] if csr else page_table[0, 2])
        inputs.kwargs["page_generations"][page] = 77
        attend(inputs.args, inputs.kwargs)
        with pytest.raises(PageTableError, match=r"page_generations\[2\] is not .*; got 77"):
            emulated_cuda.check_errors()


def test_bad_positions_and_masks_are_reported(emulated_cuda: Emulation) -> None:
    for q_lens in ((1, 1), (3, 2)):
        case = AttentionCase(q_lens=q_lens, seq_lens=(40, 33), subset=True, mask="any", **BFLOAT16)
        inputs = make_attention(case)
        for name, at, bad, told in (
            ("q_positions", 0, 40, r"q_positions\[0\]"),
            ("q_positions", 0, -1, r"q_positions\[0\]"),
            ("mask_starts", 1, 34, r"mask_starts\[1\]"),
            ("mask_starts", 1, -2, r"mask_starts\[1\]"),
        ):
            kwargs = {**inputs.kwargs, name: inputs.kwargs[name].clone()}
            kwargs[name][at] = bad
            out, _ = attend(inputs.args, kwargs)
            assert bool(out.isfinite().all())
            with pytest.raises(InvalidArgument, match=rf"{told}.*got {bad}"):
                emulated_cuda.check_errors()


@pytest.mark.parametrize("q_lens", [(1, 1), (3, 2)])
def test_readiness_is_waited_for_on_the_device(
    emulated_cuda: Emulation, q_lens: tuple[int, ...]
) -> None:
    inputs = make_attention(AttentionCase(q_lens=q_lens, seq_lens=(40, 33), **BFLOAT16))
    expected, expected_lse = attend(inputs.args, inputs.kwargs)
    counters = [torch.tensor([7]), torch.tensor([0])]
    ready = [(DeviceArray(counters[0]), 5), (DeviceArray(counters[1]), 12)]
    out, lse = attend(inputs.args, inputs.kwargs, ready=ready, ready_timeout=0.01)
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())
    with pytest.raises(NotReady, match=r"ready\[1\] had not reached its target.*got 0"):
        emulated_cuda.check_errors()
    writer = threading.Timer(0.05, lambda: counters[1].fill_(12))
    writer.start()
    out, lse = attend(inputs.args, inputs.kwargs, ready=ready, ready_timeout=60)
    writer.join()
    emulated_cuda.check_errors()
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse, "lse")
    # Page-locked memory of the host, which torch exports as any other.
    emulated_cuda.lock_pages(counters[1])
    out, lse = attend(inputs.args, inputs.kwargs, ready=[(counters[1], 12)], ready_timeout=0.0)
    emulated_cuda.check_errors()
    assert_same_bits(out, expected)
    with pytest.raises(InvalidArgument, match=r"page-locked host memory; got.*on device type 1"):
        attend(inputs.args, inputs.kwargs, ready=[(counters[0], 5)])
    with pytest.raises(InvalidArgument, match=r"ready: expected one int64.*2 x int64"):
        attend(inputs.args, inputs.kwargs, ready=[(DeviceArray(torch.zeros(2).long()), 1)])


def test_what_is_not_covered_is_told(emulated_cuda: Emulation) -> None:
    def refused(match: str, **case: Any) -> None:
        inputs = make_attention(AttentionCase(**(BFLOAT16 | case)))
        with pytest.raises(Unsupported, match=match):
            attend(inputs.args, inputs.kwargs)

    refused("cuda lacks feature 'scaled_floats'", kv_dtype="float32", kv_scale="token_head")
    refused("cuda lacks feature 'scaled_floats'", kv_scale="head")
    refused("cuda lacks feature 'any_head_dim'", head_dim=24)
    refused("cuda lacks feature 'any_head_dim'", head_dim=512)
    refused("cuda lacks feature 'any_head_dim'", head_dim=592, form="latent", num_kv_heads=1)
    refused("cuda lacks feature 'any_strides'", form="strided")
    inputs = make_attention(AttentionCase(**BFLOAT16))
    with pytest.raises(Unsupported, match="cuda lacks feature 'ready'"):
        attend(inputs.args, inputs.kwargs, ready=[])
    for feature in ("plan", "cascade"):
        with pytest.raises(Unsupported, match=f"cuda lacks feature '{feature}'"):
            choose_backend("bfloat16", pool_on_device(inputs.pool), [feature], "cuda")
    with pytest.raises(Unsupported, match="plan_attention: cuda and triton lack feature 'plan'"):
        kvlink.plan_attention(pool_on_device(inputs.pool), *inputs.args[3:], num_q_heads=4)
    with pytest.raises(InvalidArgument, match="seq_lens: expected an array on CUDA device 0"):
        kvlink.paged_attention(
            DeviceArray(inputs.args[0]),
            pool_on_device(inputs.pool),
            0,
            *inputs.args[3:],
            backend="cuda",
        )


def test_rows_that_are_not_aligned_go_elsewhere(
    emulated_cuda: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With backend="auto": those of the pool by its record, those of q once the kernel refuses."""
    taken: list[Any] = []

    class Twin:
        def paged_attention(self, q: Any, *_args: Any, **_kwargs: Any) -> None:
            taken.append(q)

    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setattr(attention, "_triton_ops", Twin)
    inputs = make_attention(AttentionCase(**BFLOAT16))
    wide = torch.zeros(2, 8, 16, 2, 68, dtype=torch.bfloat16)
    for planes in (wide[..., :64], wide.flatten()[4 : 4 + 2**15].view(2, 8, 16, 2, 64)):
        pool = pool_on_device(kvlink.KVPool.wrap([planes], "kv page slot head dim"))
        assert choose_backend("bfloat16", pool).name == "triton"
        with pytest.raises(Unsupported, match="cuda lacks feature 'unaligned_rows'"):
            choose_backend("bfloat16", pool, backend="cuda")
    q = inputs.args[0]
    moved = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    arrays = [DeviceArray(each.contiguous()) for each in inputs.args[3:]]
    place = (pool_on_device(inputs.pool), 0, *arrays)
    kvlink.paged_attention(DeviceArray(q), *place)
    assert not taken
    given = DeviceArray(moved)
    kvlink.paged_attention(given, *place)
    assert taken == [given]
    refused = "q: supported are rows that begin at multiples of 16 bytes"
    with pytest.raises(Unsupported, match=refused):
        kvlink.paged_attention(given, *place, backend="cuda")
    counter = DeviceArray(torch.ones(1).long())
    with pytest.raises(Unsupported, match=refused):  # the twin cannot wait
        kvlink.paged_attention(given, *place, ready=[(counter, 1)])
    assert len(taken) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_states", [1, 2, 5, 64, 65, 150])
def test_merge_states(emulated_cuda: Emulation, dtype: torch.dtype, num_states: int) -> None:
    torch.manual_seed(num_states)
    outs, lses = [], []
    for _ in range(num_states):
        out, lse = torch.randn(7, 3, 40), torch.randn(7, 3) * 5
        unseen = torch.rand(7, 3) < 0.3
        lses.append(lse.masked_fill(unseen, float("-inf")))
        outs.append(out.masked_fill(unseen.unsqueeze(-1), float("nan")).to(dtype))
    expected, expected_lse = merge_reference(outs, lses)
    results = []
    for seed in SEEDS:
        emulated_cuda.seed(seed)
        merged, lse = kvlink.merge_states(
            [DeviceArray(out) for out in outs],
            [DeviceArray(lse) for lse in lses],
            backend="cuda",
        )
        results.append(merged.tensor)
        assert_close(merged.tensor, expected)
        assert_close(lse.tensor, expected_lse, "lse")
        assert_same_bits(merged.tensor, results[0])
