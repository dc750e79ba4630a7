"""benchmarks/gpu_rows.py on host memory: every row, and what it asks of FlashInfer."""

from __future__ import annotations

import importlib.machinery
import inspect
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated import Emulation, emulated_cuda
from pretended import pretended_cuda

from kvlink.cache_ops import APPEND_BACKENDS

__all__ = ["emulated_cuda"]

TURNS_ON_CUDA = any(each.name == "cuda" and "rope" in each.features for each in APPEND_BACKENDS)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GOALS = {
    "decode_1x32k": "43 us", "decode_8x4k": "41 us", "decode_16x4k": "68 us",
    "decode_8x16k": "130 us", "decode_8x32k": "250 us", "decode_ragged": "0.85 of limit",
    "decode_zipf": "0.85 of limit", "decode_mha_page8_16x4000": "0.85 of limit",
    "prefill_2k": "480 TFLOP/s", "prefill_4k": "610 TFLOP/s", "prefill_8k": "690 TFLOP/s",
    "prefill_16k": "710 TFLOP/s", "mla_decode_128x4k": "3300 GB/s or 660 TFLOP/s",
    "mla_decode_128x8k": "3300 GB/s or 660 TFLOP/s",
    "mla_decode_128x16k": "3300 GB/s or 660 TFLOP/s",
    "mla_decode_128x32k": "3300 GB/s or 660 TFLOP/s", "decode_8x32k_fp8": "1.7 times",
    "relayout_1g": "0.9 of limit", "relayout_1g_fp8_digest": "0.9 of limit",
    "append_8k": "0.85 of limit", "launch_decode": "6 us",
}  # fmt: skip


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, and the limits of no machine."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_rows

    rates = {"read": 20.0, "copy": 10.0, "fma": 100.0}
    monkeypatch.setattr(gpu_rows.harness, "limits", lambda _device: rates)
    return gpu_rows


def lines_of(rows: Any, *names: str) -> list[dict[str, Any]]:
    lines = list(rows.figures(names, "cpu", 0.0))
    assert lines[0] == {"limits": {"read": 20.0, "copy": 10.0, "fma": 100.0}}
    assert not [line for line in lines if "failed" in line]
    return lines[1:]


def test_every_goal_has_a_row(rows: Any, emulated_cuda: Emulation) -> None:
    assert GOALS.keys() <= rows.ROWS.keys()
    for name in rows.ROWS:
        begun, *figures = lines_of(rows, name)
        assert begun == {"row": name}
        assert [figure["peer"] for figure in figures[:1]] == ["kvlink"]
        assert any(figure["peer"].startswith("torch_") for figure in figures)
        assert all(figure["case"] == name and figure["ms"] > 0 for figure in figures)
        assert figures[0]["note"].endswith(f"of the goal, {GOALS[name]}" if name in GOALS else "")
        kernels = [figure["note"] for figure in figures if figure["peer"] == "kvlink"][1:]
        both = [f"{kernel}: " for kernel in rows.gpu_attention.PREFILLS]
        wanted = both if "prefill" in name or "extend" in name else []
        assert [note[: note.index(": ") + 2] for note in kernels] == wanted


def test_every_row_as_on_a_device(
    rows: Any, emulated_cuda: Emulation, flashinfer: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The code that a device runs, on emulated kernels, at small sizes."""
    monkeypatch.setattr(rows.harness, "_other_memory", lambda: torch.ones(9))
    with pretended_cuda():
        for name, row in rows.ROWS.items():
            if "rope" in name and not TURNS_ON_CUDA:
                continue
            monkeypatch.setitem(rows.ROWS, name, rows.dataclasses.replace(row, run=row.dry))
            lines = list(rows.figures([name], "cuda", 0.0))
            assert not [line for line in lines if "failed" in line], lines
            emulated_cuda.check_errors()
            peers = [line["peer"] for line in lines if "peer" in line]
            assert peers[0] == "kvlink"
            assert ("flashinfer" in peers) == ("relayout" not in name)
            assert all(line["backend"] == "cuda" for line in lines if "peer" in line)
        for kind in rows.WARM:
            flashinfer.clear()
            rows.warm(kind)
            assert flashinfer


def test_the_shapes_are_those_of_the_goals(rows: Any) -> None:
    cases = rows.gpu_attention.CASES
    assert cases["decode_8x16k"].seq_lens == (16384,) * 8
    assert cases["decode_ragged"].seq_lens == (4641, 45118, 1730, 1696)
    mha = cases["decode_mha_page8_16x4000"]
    assert (mha.num_q_heads, mha.num_kv_heads, mha.page_size) == (32, 32, 8)
    assert mha.seq_lens == (4000,) * 16
    mla = cases["mla_decode_128x32k"]
    assert (mla.num_q_heads, mla.head_dim, mla.head_dim_v, mla.page_size) == (128, 576, 512, 64)
    assert mla.seq_lens == (32768,) * 128
    for name, case in cases.items():
        assert "mla" in name or case.head_dim == case.head_dim_v == 128
        assert len(case.q_lens) == len(case.seq_lens)
        small = rows.gpu_attention.shrunk(case)
        assert (max(small.q_lens) > 1) == (max(case.q_lens) > 1)


def test_reached_is_one_or_more(rows: Any) -> None:
    figure = rows.harness.Figure("", "", "", "", 16, 0.041, 3300.0, 500e3, "read", 0.85)
    reached = {name: rows.ROWS[name].reached(figure) for name in GOALS if name[-3:] != "fp8"}
    assert reached["decode_8x4k"] == pytest.approx(1.0)
    assert reached["decode_zipf"] == pytest.approx(1.0)
    assert reached["prefill_2k"] == pytest.approx(500 / 480)
    assert reached["mla_decode_128x4k"] == pytest.approx(1.0)
    noted = rows.dataclasses.replace(figure, note="3.40 times bfloat16's speed")
    assert rows.ROWS["decode_8x32k_fp8"].reached(noted) == pytest.approx(2.0)


def test_a_row_that_raises_costs_itself(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no kernel")
        yield

    monkeypatch.setitem(rows.ROWS, "decode_8x4k", rows.Row(broken, broken, "us", 1))
    lines = list(rows.figures(["decode_8x4k", "append_8k"], "cpu", 0.0))
    assert lines[2] == {"failed": "decode_8x4k", "why": "RuntimeError: no kernel"}
    assert lines[3] == {"row": "append_8k"}
    assert lines[-1]["case"] == "append_8k"


# --- FlashInfer -----------------------------------------------------------------------------------

# The parameters of flashinfer 0.6.6 up to the last one that is used.
PLAN_DECODE = (
    "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode "
    "window_left logits_soft_cap q_data_type kv_data_type o_data_type"
)
PLAN_PREFILL = (
    "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads "
    "head_dim_qk page_size head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode "
    "use_fp16_qk_reduction sm_scale window_left logits_soft_cap rope_scale rope_theta q_data_type "
    "kv_data_type"
)
PLAN_MLA = (
    "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size "
    "causal sm_scale q_data_type kv_data_type"
)
APPEND = (
    "append_key append_value batch_indices positions paged_kv_cache kv_indices kv_indptr "
    "kv_last_page_len kv_layout"
)


def bound(parameters: str, args: Any, kwargs: Any, defaults_from: int) -> dict[str, Any]:
    """The arguments by name; those from a place on have defaults."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [
            inspect.Parameter(
                name, kind, default=inspect.Parameter.empty if i < defaults_from else None
            )
            for i, name in enumerate(parameters.split())
        ]
    )
    return dict(signature.bind(*args, **kwargs).arguments)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A package of that name that remembers what it was asked for."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def wrapper(plan: str, run: str, defaults_from: int) -> type:
        class Wrapper:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                names = "float_workspace_buffer kv_layout use_cuda_graph use_tensor_cores backend"
                self.made = bound(names, args, kwargs, 1)

            def plan(self, *args: Any, **kwargs: Any) -> None:
                asked.append(("plan", bound(plan, args, kwargs, defaults_from)))

            def run(self, *args: Any, **kwargs: Any) -> None:
                asked.append(("run", bound(run, args, kwargs, 2)))

        return Wrapper

    module, mla = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    paged = "q paged_kv_cache q_scale k_scale v_scale out"
    module.BatchDecodeWithPagedKVCacheWrapper = wrapper(PLAN_DECODE, paged, 7)  # type: ignore[attr-defined]
    module.BatchPrefillWithPagedKVCacheWrapper = wrapper(PLAN_PREFILL, paged, 8)  # type: ignore[attr-defined]
    mla.BatchMLAPagedAttentionWrapper = wrapper(  # type: ignore[attr-defined]
        PLAN_MLA, "q_nope q_pe ckv_cache kpe_cache out", 12
    )
    module.mla = mla  # type: ignore[attr-defined]

    def append(*args: Any, **kwargs: Any) -> None:
        asked.append(("append", bound(APPEND, args, kwargs, 8)))

    module.append_paged_kv_cache = append  # type: ignore[attr-defined]
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    return asked


def test_flashinfer_gets_the_same_problem(
    rows: Any, flashinfer: list[tuple[str, dict[str, Any]]]
) -> None:
    for name in ("decode_ragged", "extend_4x512of8k", "decode_8x32k_fp8", "mla_decode_128x8k"):
        flashinfer.clear()
        figures = lines_of(rows, name)[1:]
        assert "flashinfer" in [figure["peer"] for figure in figures]
        case = rows.gpu_attention.shrunk(rows.gpu_attention.CASES[name.removesuffix("_fp8")])
        (_, plan), (_, run) = flashinfer[:2]
        lens, page = torch.tensor(case.seq_lens), case.page_size
        indptr = plan["kv_indptr" if "mla" in name else
                      "indptr" if "decode" in name else "paged_kv_indptr"]  # fmt: skip
        assert indptr.tolist() == [0, *itertools.accumulate((-(-lens // page)).tolist())]
        assert plan["page_size"] == page
        if "mla" in name:
            assert plan["kv_len_arr"].tolist() == lens.tolist()
            assert (plan["head_dim_ckv"], plan["head_dim_kpe"]) == (512, 64)
            assert plan["causal"] is True
            assert plan["sm_scale"] == 576**-0.5
            assert run["q_nope"].shape == (*run["q_pe"].shape[:2], 512) == run["out"].shape
            assert run["ckv_cache"].shape == (*run["kpe_cache"].shape[:2], 512)
            assert run["ckv_cache"].shape[:2] == (int(indptr[-1]), page)
            continue
        last = plan["last_page_len" if "decode" in name else "paged_kv_last_page_len"]
        assert last.tolist() == ((lens - 1) % page + 1).tolist()
        heads = case.num_q_heads, case.num_kv_heads
        assert (plan["num_qo_heads"], plan["num_kv_heads"]) == heads
        k, v = run["paged_kv_cache"]
        assert k.shape == v.shape == (int(indptr[-1]), page, case.num_kv_heads, 128)
        wanted = torch.float8_e4m3fn if "fp8" in name else torch.bfloat16
        assert plan["kv_data_type"] == k.dtype == wanted
        assert plan["q_data_type"] == run["q"].dtype == torch.bfloat16
        if "extend" in name:
            assert plan["causal"] is True
            assert plan["qo_indptr"].tolist() == [0, *itertools.accumulate(case.q_lens)]


def test_flashinfer_appends_to_the_same_pages(
    rows: Any, flashinfer: list[tuple[str, dict[str, Any]]]
) -> None:
    figures = lines_of(rows, "append_8k")[1:]
    assert [figure["peer"] for figure in figures] == ["kvlink", "flashinfer", "torch_index"]
    _, arguments = flashinfer[0]
    assert arguments["append_key"].shape == (40, 8, 128)
    assert arguments["positions"].tolist() == list(range(40))
    assert arguments["kv_last_page_len"].tolist() == [8]
    assert arguments["paged_kv_cache"][0].shape == (3, 16, 8, 128)


def test_kinds_that_are_not_ready_are_left_out(
    rows: Any, flashinfer: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLINK_FLASHINFER", "mla")
    assert "flashinfer" not in [line.get("peer") for line in lines_of(rows, "decode_8x4k")]
    assert "flashinfer" in [line.get("peer") for line in lines_of(rows, "mla_decode_128x4k")]
    assert set(rows.WARM) == set(rows.flashinfer_call.KINDS)
    assert set(rows.WARM.values()) <= set(rows.ROWS)


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decode_ragged", "prefill_2k", "extend_4x512of8k",
                                  "mla_decode_128x16k"])  # fmt: skip
def test_torch_computes_the_same(rows: Any, name: str) -> None:
    """What stands beside kvlink in a row does that row's work."""
    gpu = rows.gpu_attention
    problem = gpu.make_problem(gpu.shrunk(gpu.CASES[name]), "bfloat16", "cpu")
    problem.kvlink()
    starts = [0]
    for out in gpu.sdpa(problem)():
        if problem.case.latent:
            out = out.transpose(1, 2)
        for each in out.transpose(1, 2):  # [row, head, dim] of a sequence
            starts.append(starts[-1] + len(each))
            ours = problem.out[starts[-2] : starts[-1]]
            torch.testing.assert_close(ours, each, rtol=2e-2, atol=2e-2)
    assert starts[-1] == len(problem.q)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3"])
def test_torch_moves_the_same(rows: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = rows.gpu_cache_ops
    made: list[Any] = []
    make = moves.make_pool

    def remembered(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(moves, "make_pool", remembered)
    monkeypatch.setattr(moves.harness, "measure", lambda work, *_: (work(), shown(), 1.0)[-1])
    seen: list[torch.Tensor] = []

    def shown() -> None:
        pool = made[1]
        planes = [torch.from_dlpack(pool.k(0)), torch.from_dlpack(pool.v(3))]
        seen.append(torch.stack([each.float() for each in planes]))
        for plane in planes:
            plane.view(torch.uint8).zero_()

    list(moves.relayout("", "cpu", 0.0, 1 << 20, dtype))
    assert float(seen[0].abs().max()) > 0
    if dtype == "bfloat16":
        assert torch.equal(seen[0], seen[1])
    else:  # each is rounded to float8 by itself, torch's without a scale: by a sixteenth at most
        torch.testing.assert_close(seen[0] * 0.05, seen[1], rtol=0.13, atol=0.05)


@pytest.mark.parametrize("name", ["append_8k", "append_8k_rope"])
def test_torch_appends_the_same(rows: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = rows.gpu_cache_ops
    pools: list[Any] = []
    wrap = moves.KVPool.wrap
    monkeypatch.setattr(
        moves.KVPool, "wrap", lambda *args: (pools.append(wrap(*args)), pools[-1])[1]
    )
    seen: list[torch.Tensor] = []

    def shown() -> None:
        planes = [torch.from_dlpack(plane(1)) for plane in (pools[0].k, pools[0].v)]
        seen.append(torch.stack(planes).clone())
        for plane in planes:
            plane.zero_()

    monkeypatch.setattr(moves.harness, "measure", lambda work, *_: (work(), shown(), 1.0)[-1])
    list(rows.ROWS[name].dry(name, "cpu", 0.0))
    assert float(seen[0].abs().max()) > 0
    assert torch.equal(seen[0], seen[1])
