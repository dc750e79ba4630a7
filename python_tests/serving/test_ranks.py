"""On every path and with several ranks of prefill, the tokens are those of a single process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import Alone
from command import generate
from running import SECONDS, Running, alive, jsonl, wait_until_gone
from tiny import CONTEXT, make_prompts, to_jsonl, token_ids

import kvlink
from kvlink.errors import InvalidArgument
from kvlink.serving.config import ModelConfig
from kvlink.serving.options import Options, SideOptions, side_threads
from kvlink.serving.ranks import head_view, shard_of

PATHS = ("host_shm", "ucx")
Checkpoints = Callable[[str], tuple[Any, Path]]


def mixed_lines() -> list[dict[str, Any]]:
    """Greedy ones and sampled ones."""
    lines = make_prompts(16, longest=90)
    for index, line in enumerate(lines):
        if index % 3:
            line.update(temperature=0.4 + index / 16, top_p=0.9, seed=index)
    return lines


@pytest.mark.two_process
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_tokens_are_those_of_a_single_process(
    path: str, num_ranks: int, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    _, model = checkpoint("llama3")
    lines = mixed_lines()
    report = tmp_path / "report.json"
    records, _ = generate(
        model,
        to_jsonl(lines),
        "--dtype=float32",
        f"--path={path}",
        f"--prefill-ranks={num_ranks}",
        "--prefill-page-size=16",
        "--decode-page-size=7",
        "--decode-layout=hnd",
        "--max-batch-tokens=100",
        f"--report={report}",
    )
    alone = Alone(model)
    expected = [alone.generate(line, index) for index, line in enumerate(lines)]
    assert [record["token_ids"] for record in records] == expected
    figures = json.loads(report.read_text())
    migration, config = figures["migration"], alone.config
    assert migration["path"] == path
    assert migration["verified"] == len(lines)
    num_tokens = sum(len(token_ids(line)) for line in lines)
    row = config.num_kv_heads * config.head_dim * 2 * 4
    assert migration["bytes"] == num_tokens * config.num_layers * row
    early = figures["early_decode"]
    assert 0 <= early["requests"] <= len(lines)
    assert early["dropped"] == 0


@pytest.mark.two_process
@pytest.mark.parametrize(
    ("family", "num_ranks", "kv_dtype"),
    [
        ("llama2", 3, "float32"),
        ("llama2", 4, "int8"),
        ("mistral", 2, "bfloat16"),
        ("llama_linear_tied", 2, "float32"),
        ("qwen3", 3, "float32"),
    ],
)
def test_heads_are_cut_among_ranks(
    family: str, num_ranks: int, kv_dtype: str, checkpoint: Checkpoints
) -> None:
    """Also unevenly, among more ranks than heads, and converted or with scales on the way."""
    _, model = checkpoint(family)
    lines = mixed_lines()[:6]
    options = ["--dtype=float32", "--prefill-layout=packed", "--prefill-kv-dtype=" + kv_dtype]
    records, _ = generate(model, to_jsonl(lines), *options, f"--prefill-ranks={num_ranks}")
    if kv_dtype == "float32":
        alone = Alone(model)
        expected = [alone.generate(line, index) for index, line in enumerate(lines)]
    else:
        one_rank, _ = generate(model, to_jsonl(lines), *options)
        expected = [record["token_ids"] for record in one_rank]
    assert [record["token_ids"] for record in records] == expected


@pytest.mark.two_process
def test_few_pages_for_two_ranks(checkpoint: Checkpoints) -> None:
    _, model = checkpoint("mistral")
    lines = make_prompts(20)
    records, _ = generate(
        model,
        to_jsonl(lines),
        "--dtype=float32",
        "--prefill-ranks=2",
        "--prefill-page-size=8",
        "--decode-page-size=8",
        "--prefill-num-pages=16",
        "--decode-num-pages=18",
        "--max-num-seqs=3",
        "--max-batch-tokens=7",
    )
    alone = Alone(model)
    assert [r["token_ids"] for r in records] == [alone.generate(line) for line in lines]


@pytest.fixture
def running(checkpoint: Checkpoints, request: pytest.FixtureRequest) -> Iterator[Running]:
    run = Running(checkpoint("llama2")[1], *request.param, num_ranks=2)
    yield run
    for pid in (run.process.pid, *run.workers.values()):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    run.process.communicate(timeout=SECONDS)


@pytest.mark.two_process
@pytest.mark.parametrize("running", [()], indirect=True)
@pytest.mark.parametrize("name", ["prefill-0", "prefill-1", "decode"])
def test_killed_rank(running: Running, name: str) -> None:
    pid = running.workers[name]
    os.kill(pid, signal.SIGKILL)
    status, errors = running.finish()
    assert status == 1
    assert errors.strip() == f"kvlink generate: {name} worker (pid {pid}) was killed by SIGKILL"
    wait_until_gone(list(running.workers.values()))


@pytest.mark.two_process
def test_rank_that_stands_still_for_a_while(checkpoint: Checkpoints) -> None:
    """What the other rank reports does not keep its grants alive: decode grants anew."""
    run = Running(checkpoint("llama2")[1], "--grant-ttl=2", lines=jsonl(12, CONTEXT), num_ranks=2)
    os.kill(run.workers["prefill-1"], signal.SIGSTOP)
    time.sleep(2.4)
    os.kill(run.workers["prefill-1"], signal.SIGCONT)
    assert run.process.stdout is not None
    records = [json.loads(line) for line in run.process.stdout.read().splitlines()]
    assert run.finish() == (0, "")
    assert [len(record["token_ids"]) for record in records] == [CONTEXT - 1] * 11
    wait_until_gone(list(run.workers.values()))


@pytest.mark.parametrize("layout", ["nhd", "hnd", "packed"])
@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "fp8_e5m2"])
def test_heads_of_a_pool_are_a_view(layout: str, kv_dtype: str, checkpoint: Checkpoints) -> None:
    config = ModelConfig.from_dir(checkpoint("llama2")[1])
    side = SideOptions(8, layout, kv_dtype)
    pool, target = (
        kvlink.KVPool.create(
            side.kv_layout(config, "float32"), num_layers=config.num_layers, num_pages=2
        )
        for _ in range(2)
    )
    k, v = torch.randn(2, 16, 4, config.head_dim, generator=torch.Generator().manual_seed(1))
    kvlink.append_kv(k, v, pool, 1, torch.arange(16))
    parts = [shard_of(config, rank, 3).kv_heads for rank in range(3)]
    assert [list(heads) for heads in parts] == [[0, 1], [2], [3]]
    for heads in parts:
        view = head_view(pool, heads)
        assert view.layout.num_kv_heads == len(heads)
        kvlink.relayout_pages(
            view, [0, 1], head_view(target, heads), [0, 1], num_tokens=16, layers=range(3)
        )
    assert (torch.from_dlpack(target.k(1)) == torch.from_dlpack(pool.k(1))).all()
    assert (torch.from_dlpack(target.v(1)) == torch.from_dlpack(pool.v(1))).all()
    assert head_view(pool, range(4)) is pool


def test_ranks_share_threads_and_memory(checkpoint: Checkpoints) -> None:
    assert side_threads(16, 2) == (8, 16)
    assert side_threads(2, 4) == (1, 2)
    _, model = checkpoint("llama2")
    config = ModelConfig.from_dir(model)
    options = Options(str(model), prefill_ranks=10**6, prefill=SideOptions(num_pages=10**5))
    with pytest.raises(InvalidArgument, match="num_pages: 100000 pages take"):
        options.sized(config, [(10, 20)])


def test_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    from kvlink.cli import main

    for option, reason in (
        ("--path=pigeon", "invalid choice: 'pigeon'"),
        ("--prefill-ranks=0", "expected 1 to 64; got 0"),
        ("--prefill-ranks=65", "expected 1 to 64; got 65"),
    ):
        with pytest.raises(SystemExit):
            main(["generate", "--model=.", option])
        assert reason in capsys.readouterr().err
