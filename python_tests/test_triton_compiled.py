"""The launchers of kvlink.triton, compiled ahead of time for GPUs that are not here.

The driver is replaced by one that names a target, and launches end after compilation: what is
compiled is what the launchers would run, with their own configurations and specialisations.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from kvlink.errors import Unsupported
from kvlink.triton import (
    TensorPool,
    append_kv,
    apply_rope,
    configs,
    digest_pages,
    merge_states,
    paged_attention,
    relayout_pages,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NEWER_PTXAS = "ptxas-blackwell" if (TOOLS / "ptxas-blackwell").exists() else "ptxas"
CAPABILITIES = [80, 90, 100]
SMALLER = [86, 89, 120]  # these have 99 KiB
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program may have
SHARED_BYTES |= dict.fromkeys(SMALLER, 99 << 10)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Target:
    """A driver as far as compiling asks for one."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


@pytest.fixture(params=CAPABILITIES)
def compiled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[int, list[Any]]]:
    """(compute capability, what the test's launches have compiled)."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        self.device_caches.clear()  # they are by device, not by target
        return kernels[-1]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    native = sys.modules["kvlink.triton.paged_attention"]  # the name itself is the operator's
    monkeypatch.setattr(native, "_capability", lambda _: request.param)
    driver.set_active(Target(request.param))
    try:
        yield request.param, kernels
    finally:
        driver.set_active(None)


def make_pool(
    dtype: str, head_dim: int, head_dim_v: int | None = None, *, heads: int = 8, scale: str = "none"
) -> TensorPool:
    """Pages of 16; latent ones if there is one head."""
    shape = (4, 16, heads, head_dim)
    stored = TYPES.get(dtype, torch.int8 if dtype == "int8" else torch.uint8)
    k = torch.empty(shape, dtype=stored)
    v = None if heads == 1 else [torch.empty(*shape[:3], head_dim_v or head_dim, dtype=stored)]
    shapes = {"none": (), "head": (heads,), "token_head": shape[:3]}
    scales = None if scale == "none" else [torch.ones(shapes[scale])]
    return TensorPool(
        [k], v, dtype=dtype, scale=scale, k_scale=scales, v_scale=None if heads == 1 else scales,
        head_dim_v=head_dim_v,
    )  # fmt: skip


def attend(
    pool: TensorPool, group: int, *, decode: bool, q_dtype: str = "bfloat16", **kwargs: Any
) -> None:
    num_tokens = 2 if decode else 64
    shape = (num_tokens, pool.num_kv_heads * group, pool.head_dim)
    if not decode:
        kwargs["q_indptr"] = [0, 32, 64]
    paged_attention(
        torch.empty(shape, dtype=TYPES[q_dtype]), pool, 0, torch.zeros(2, 4096, dtype=torch.int32),
        [64, 64], return_lse=True, **kwargs,
    )  # fmt: skip


def everything(num_q_heads: int) -> dict[str, Any]:
    per_head = torch.ones(num_q_heads)
    return dict(window=100, softcap=30.0, sinks=per_head, alibi_slopes=per_head)


def selecting(decode: bool) -> dict[str, Any]:
    num_tokens = 2 if decode else 64
    ints = torch.zeros(2, 4096, dtype=torch.int32)
    return dict(
        mask=torch.zeros(num_tokens, 8, dtype=torch.uint8), mask_starts=[0, 0],
        q_positions=torch.arange(32).int().repeat(2)[-num_tokens:] if not decode else [0, 0],
        page_generations=torch.zeros(4, dtype=torch.int32), expected_generations=ints,
    )  # fmt: skip


ROWS = torch.empty(64, 8, 128, dtype=torch.bfloat16)
LATENT_ROWS = torch.empty(64, 1, 576, dtype=torch.bfloat16)
SLOTS = torch.zeros(64, dtype=torch.int64)
ROPE = (torch.ones(100, 128), SLOTS, False, 0)

CASES: dict[str, Callable[[], Any]] = {
    "rope": lambda: apply_rope(ROWS, ROPE),
    "rope-interleaved": lambda: apply_rope(ROWS.float(), (*ROPE[:2], True, 0)),
    "merge": lambda: merge_states([ROWS] * 3, [torch.zeros(64, 8)] * 3),
    "append": lambda: append_kv(ROWS, ROWS, make_pool("bfloat16", 128), 0, SLOTS, rope=ROPE),
    "append-fp8": lambda: append_kv(
        ROWS, ROWS, make_pool("float8_e4m3", 128, scale="token_head"), 0, SLOTS, rope=ROPE
    ),
    "append-latent": lambda: append_kv(
        LATENT_ROWS, None, make_pool("bfloat16", 576, 512, heads=1), 0, SLOTS
    ),
}


def move(src: TensorPool, dst: TensorPool) -> None:
    relayout_pages(src, [0, 1], dst, [2, 3], num_tokens=32, digest=True)


CASES |= {
    "relayout": lambda: move(make_pool("bfloat16", 128), make_pool("bfloat16", 128)),
    "relayout-fp8": lambda: move(
        make_pool("bfloat16", 128), make_pool("float8_e4m3", 128, scale="token_head")
    ),
    "relayout-from-fp8": lambda: move(
        make_pool("float8_e5m2", 128, scale="head"), make_pool("float32", 128)
    ),
    "relayout-latent": lambda: move(
        make_pool("bfloat16", 576, 512, heads=1),
        make_pool("int8", 576, 512, heads=1, scale="token_head"),
    ),
    "relayout-long": lambda: move(
        make_pool("float16", 2048), make_pool("int8", 2048, scale="token_head")
    ),
    "digest": lambda: digest_pages(make_pool("bfloat16", 128), [0, 1], num_tokens=32),
}
for _kind, _decode in (("decode", True), ("extend", False)):
    CASES |= {
        f"{_kind}-64": lambda d=_decode: attend(make_pool("bfloat16", 64), 8, decode=d),
        f"{_kind}-128": lambda d=_decode: attend(make_pool("bfloat16", 128), 4, decode=d),
        f"{_kind}-128-everything": lambda d=_decode: attend(
            make_pool("bfloat16", 128), 4, decode=d, **everything(32)
        ),
        f"{_kind}-128-selecting": lambda d=_decode: attend(
            make_pool("bfloat16", 128), 4, decode=d, **selecting(d)
        ),
        f"{_kind}-128-fp8": lambda d=_decode: attend(
            make_pool("float8_e4m3", 128, scale="token_head"), 4, decode=d
        ),
        f"{_kind}-192-128": lambda d=_decode: attend(
            make_pool("bfloat16", 192, 128), 1, decode=d
        ),
        f"{_kind}-256-int8": lambda d=_decode: attend(
            make_pool("int8", 256, scale="head"), 8, decode=d
        ),
        f"{_kind}-latent": lambda d=_decode: attend(
            make_pool("bfloat16", 576, 512, heads=1), 128, decode=d
        ),
        f"{_kind}-128-float32": lambda d=_decode: attend(
            make_pool("float32", 128), 4, decode=d, q_dtype="float32"
        ),
    }  # fmt: skip


# What needs the most shared memory of each line of the smaller devices' table.
LARGEST: dict[str, Callable[[], Any]] = {
    "decode-64x256": lambda: attend(make_pool("bfloat16", 256), 64, decode=True),
    "decode-576-512": lambda: attend(make_pool("bfloat16", 576, 512), 4, decode=True),
    "decode-64x576-512": lambda: attend(make_pool("bfloat16", 576, 512), 64, decode=True),
    "extend-576-512": lambda: attend(make_pool("bfloat16", 576, 512), 4, decode=False),
    "decode-float32": lambda: attend(
        make_pool("float32", 576, 512, heads=1), 16, decode=True, q_dtype="float32"
    ),
    "decode-128": CASES["decode-128"],
    "extend-128": CASES["extend-128"],
}


@pytest.mark.parametrize(
    ("compiled", "case"),
    [(86, case) for case in LARGEST]
    + [(120, case) for case in LARGEST if case != "decode-float32"]
    + [(89, "decode-128-fp8"), (89, "extend-256-int8")],
    indirect=["compiled"],
)
def test_smaller_devices_have_room(case: str, compiled: tuple[int, list[Any]]) -> None:
    capability, kernels = compiled
    (LARGEST | CASES)[case]()
    assert kernels
    for kernel in kernels:
        assert kernel.metadata.target.arch == capability
        assert (
            kernel.metadata.shared <= SHARED_BYTES[capability] == configs.shared_bytes(capability)
        )


def test_devices_of_no_table_have_the_least_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {capability: configs.shared_bytes(capability) for capability in SHARED_BYTES} == (
        SHARED_BYTES
    )
    assert configs.shared_bytes(199) == 99 << 10
    native = sys.modules["kvlink.triton.paged_attention"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(Unsupported, match=r"device: .* compute capability 8\.0 .*; got 7\.5"):
        native._capability(torch.device("cuda"))


@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(
    case: str, compiled: tuple[int, list[Any]], tmp_path: Path
) -> None:
    capability, kernels = compiled
    CASES[case]()
    assert kernels
    for i, kernel in enumerate(kernels):
        assert kernel.metadata.target.arch == capability
        assert kernel.metadata.shared <= SHARED_BYTES[capability]
        cubin = tmp_path / f"{i}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        listed = run_tool("cuobjdump", "-res-usage", cubin)
        frame = re.search(r"STACK:(\d+)", listed)
        assert frame, listed
        if int(frame[1]):  # spills, or a call: ptxas tells which
            source = tmp_path / f"{i}.ptx"
            source.write_text(kernel.asm["ptx"])
            target = re.search(r"\.target (\w+)", kernel.asm["ptx"])
            assert target
            name = "ptxas" if capability < 90 else NEWER_PTXAS
            told = run_tool(name, "-v", f"-arch={target[1]}", "-o", cubin, source)
            spilled = re.search(r"(\d+) bytes spill stores", told)
            assert spilled, told
            assert int(spilled[1]) == 0, told


def run_tool(name: str, *arguments: object) -> str:
    """What one of the tools that come with Triton prints."""
    command = [str(part) for part in (TOOLS / name, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_copies_are_wide(compiled: tuple[int, list[Any]]) -> None:
    """16 bytes an instruction: strides of 1 and alignments reach the kernels."""
    _, kernels = compiled
    CASES["append"]()
    CASES["decode-128"]()
    CASES["relayout"]()
    append, attention, *_, relayout = (kernel.asm["ptx"] for kernel in kernels)
    assert re.search(r"ld\.global\.v4\.b32", append)
    assert re.search(r"st\.global\.v4\.b32", append)
    assert re.search(r"ld\.global\.v4\.b32", relayout)
    assert re.search(r"st\.global\.v4\.b32", relayout)
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", attention)
