"""kvlink._cuda: what can be told without a GPU. Its kernels are run by the tests marked gpu."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvlink import KVLayout, KVPool, append_kv, copy_pages, digest_pages, relayout_pages
from kvlink.errors import KVLinkError, Unsupported
from kvlink.layout import KVLayout as Layout

SPEC = importlib.util.find_spec("kvlink._cuda")
built = pytest.mark.skipif(SPEC is None, reason="kvlink._cuda is not built (no nvcc)")
LAYOUT = KVLayout.nhd(num_kv_heads=2, head_dim=16, page_size=4, dtype="bfloat16")


def pool_on(device: tuple[int, int], layout: Layout = LAYOUT) -> KVPool:
    """A pool that claims to be on a device; its addresses are never dereferenced here."""
    planes = [(4096, 8192, 0, 0)]
    return KVPool(layout, 4, planes, [0], device, None)


@built
def test_loads_without_a_driver_and_counts_devices() -> None:
    code = (
        "import kvlink, kvlink._cuda as c;"
        "assert (c.device_count() == 0) == bool(c.unavailable_reason());"
        "print(c.device_count(), c.unavailable_reason(), c.runtime_version)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def find_cuobjdump() -> str:
    """CUDA's, or Triton's own; skips without either."""
    folders = ["/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("no cuobjdump")
    return found


@built
def test_one_image_per_architecture() -> None:
    assert SPEC is not None
    cuobjdump = find_cuobjdump()
    listed = subprocess.run(
        [cuobjdump, "--list-elf", str(SPEC.origin)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    wanted = re.split("[;,]", os.environ.get("KVLINK_CUDA_ARCHS", "80;90a;100"))
    assert set(re.findall(r"sm_(\d+a?)", listed.stdout)) == set(wanted)


@built
def test_no_kernel_spills() -> None:
    """ptxas's reports on the kernels, kept beside the objects when they were compiled."""
    objects = Path(__file__).parents[1] / "build" / "objects"
    reports = sorted(objects.glob("*/csrc__kvlink__cuda__*.cu.ptxas"))
    if not reports:
        pytest.skip("kvlink._cuda was not built in this tree")
    kernels = 0
    for report in reports:
        text = report.read_text()
        found = re.findall(
            r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads\nptxas info\s*: Used (\d+) registers",
            text,
        )
        assert len(found) == text.count("Compiling entry function"), report
        for kernel, stack, stores, loads, registers in found:
            assert (int(stores), int(loads)) == (0, 0), f"{report.name}: {kernel}"
            assert int(registers) <= 255
            # Weights that add_special looks up by number, where some value is not finite.
            assert int(stack) <= (128 if "AttentionTile" in kernel else 0), f"{kernel}: {stack}"
        kernels += len(found)
    assert kernels > 0


def compiled_source(source: str) -> Path:
    """Its object; skips without one."""
    objects = Path(__file__).parents[1] / "build" / "objects"
    compiled = sorted(objects.glob(f"*/csrc__kvlink__cuda__{source}.cu.o"))
    if not compiled:
        pytest.skip("kvlink._cuda was not built in this tree")
    return compiled[-1]


def machine_code(compiled: Path, *options: str) -> list[str]:
    """Of its kernels."""
    dumped = subprocess.run(
        [find_cuobjdump(), "-sass", *options, str(compiled)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return dumped.stdout.split("Function : ")[1:]


# Kernels that move rows of any kind, but for those whose dims are apart ("ELb0" of move_rows).
@built
@pytest.mark.parametrize(
    ("source", "copies", "moves"),
    [("relayout_pages", "copy_moved", r"move_rowsILi\d+ELb1E"),
     ("append_kv", "copy_appended", r"append_rowsILi\d+ELb[01]E")],
)  # fmt: skip
def test_rows_move_by_16_bytes(source: str, copies: str, moves: str) -> None:
    """In every architecture; where rows keep their bytes, 64 of a thread are under way at once."""
    kernels = machine_code(compiled_source(source))
    targets = len(re.split("[;,]", os.environ.get("KVLINK_CUDA_ARCHS", "80;90a;100")))
    seen = {copies: 0, moves: 0}
    for kernel in kernels:
        title, _, code = kernel.partition("\n")
        for name in seen:
            if re.search(name, title):
                seen[name] += 1
                least = 4 if name == copies else 1
                for instruction in ("LDG", "STG"):
                    found = re.findall(rf"\b{instruction}\.[.\w]*\b128\b", code)
                    assert len(found) >= least, (title, instruction)
    assert seen[copies] == targets
    assert seen[moves] >= 3 * targets


def kernels_of_sm90(source: str, name: str) -> list[str]:
    """Machine code of a source's kernels of that name, each of which must be wgmma fed by bulk
    copies, with nothing serialised or spilled."""
    compiled = compiled_source(source)
    if "90a" not in re.split("[;,]", os.environ.get("KVLINK_CUDA_ARCHS", "80;90a;100")):
        pytest.skip("not built for sm_90a")
    report = compiled.with_suffix(".ptxas").read_text()
    assert "serialized" not in report
    assert "setmaxnreg ignored" not in report
    every = machine_code(compiled, "-arch", "sm_90a")
    kernels = [part for part in every if name in part[:300]]
    assert len(kernels) == report.count("for 'sm_90a'")
    for kernel in kernels:
        title = kernel.partition("\n")[0]
        assert "HGMMA" in kernel, title
        assert "UTMALDG" in kernel, title
        assert "USETMAXREG" in kernel, title
        assert not re.search(r"\b(LDL|STL)\b", kernel), title
    return kernels


def exponentials_beside_products(kernel: str) -> list[int]:
    """How many lie before each wait for the last products, after one for all but these."""
    between = re.findall(r"DEPBAR.LE gsb0, 0x1(.*?)DEPBAR.LE gsb0, 0x0", kernel, re.DOTALL)
    return [part.count("MUFU.EX2") for part in between]


@built
def test_long_prompts_use_the_tensor_cores_of_sm90() -> None:
    """Every instance of the sm_90a kernel; its softmax before the wait for the products that run
    beside it."""
    kernels = kernels_of_sm90("paged_attention_sm90", "prefill")
    overlapping = [kernel for kernel in kernels if "ELi128ELi128ELb0ELi1E" in kernel[:300]]
    assert len(overlapping) == 2  # bfloat16 and float16
    for kernel in overlapping:
        (count,) = exponentials_beside_products(kernel)
        assert count >= 64


@built
def test_latent_pages_use_the_tensor_cores_of_sm90() -> None:
    """The same of latent pages, whose blocks have half as many positions."""
    kernels = kernels_of_sm90("latent_sm90", "attend_latent")
    assert len(kernels) == 4  # bfloat16 and float16, general or not
    for kernel in kernels:
        assert kernel.count("UTMAPF") > 0
        (count,) = exponentials_beside_products(kernel)
        assert count >= 32


@built
def test_calls_without_a_device_say_so() -> None:
    from kvlink import _cuda

    if _cuda.device_count() > 0:
        pytest.skip("there is a CUDA device")
    pool = pool_on((2, 0))
    k, slots = torch.zeros(1, 2, 16), torch.zeros(1).long()
    for call in (
        lambda: append_kv(k, k, pool, 0, slots, stream=0),
        lambda: relayout_pages(pool, [0], pool, [1], num_tokens=1, stream=0),
        lambda: copy_pages(pool, [0], [1], stream=0),
        lambda: digest_pages(pool, [0], num_tokens=1, stream=0),
        lambda: _cuda.check_errors(0),
    ):
        with pytest.raises(Unsupported, match="no usable device"):
            call()


def test_without_the_cuda_part_calls_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kvlink._cuda", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    for backend in ("cuda", "auto"):
        with pytest.raises(Unsupported, match=r"cuda lacks package 'kvlink\._cuda'"):
            copy_pages(pool_on((2, 0)), [0], [1], stream=0, backend=backend)


def test_pools_of_two_devices_do_not_mix() -> None:
    host = KVPool.create(LAYOUT, num_layers=1, num_pages=4)
    for src, dst in ((host, pool_on((2, 0))), (pool_on((2, 0)), host)):
        with pytest.raises(Unsupported, match="one device; got DLPack devices"):
            relayout_pages(src, [0], dst, [0], num_tokens=1)
    with pytest.raises(KVLinkError, match="host memory; got device type 10"):
        digest_pages(pool_on((10, 0)), [0], num_tokens=1)
