"""What the prefill and the decode process share: start, set-up, and how they end."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvlink.errors import KVLinkError
from kvlink.serving.channel import Channel, Message
from kvlink.serving.options import Options

_PR_SET_PDEATHSIG = 1
_FAILED_STATUS = 1
IDLE_S = 1.0  # bound of a wait for the router
_SETUP_S = 600.0  # for the router to say what to load
BUSY_S = 0.0005  # between two looks at transfers that are under way


class Worker:
    """Model, pool, pages and endpoint of one side. Built from the router's first message."""

    def __init__(self, role: str, rank: int, setup: Message, channel: Channel) -> None:
        import torch

        import kvlink
        from kvlink import _C
        from kvlink.pages import PageAllocator
        from kvlink.serving.checkpoint import eos_ids, load_model
        from kvlink.serving.config import ModelConfig
        from kvlink.serving.prefix_cache import PrefixCache
        from kvlink.serving.ranks import head_view, shard_of
        from kvlink.transfer import Endpoint

        self.channel = channel
        self.rank = rank  # 0, but for several ranks of prefill
        self.options = options = Options.from_message(setup["options"])
        side = options.prefill if role == "prefill" else options.decode
        torch.set_num_threads(side.num_threads)
        _C.set_num_threads(side.num_threads)
        model_dir = Path(options.model_dir)
        config = ModelConfig.from_dir(model_dir)
        dtype = options.model_dtype(config)
        self.eos = frozenset() if options.ignore_eos else eos_ids(model_dir)
        self.model = load_model(model_dir, config, dtype)
        self.pool = kvlink.KVPool.create(
            side.kv_layout(config, dtype),
            num_layers=config.num_layers,
            num_pages=side.num_pages,
            shared=True,
        )
        self.allocator = PageAllocator(side.num_pages, side.page_size)
        # Whatever KV depends on beside the tokens.
        root = repr((str(model_dir.resolve()), config, dtype, self.pool.layout)).encode()
        self.cache = PrefixCache(
            self.allocator, hashlib.sha256(root).digest(), options.prefix_caching
        )
        # Failed grants keep their slot until nobody writes to their pages any more.
        self.endpoint = Endpoint(
            role,
            secret=bytes.fromhex(setup["secret"]),
            num_slots=2 * options.max_num_seqs,
            num_page_entries=4 * side.num_pages,
        )
        num_ranks = options.prefill_ranks if role == "prefill" else 1
        shard = shard_of(config, self.rank, num_ranks)
        self.endpoint.register(
            head_view(self.pool, shard.kv_heads), shard, generations=self.allocator.generations
        )
        self.stopping = False

    def serve(self) -> None:
        """Works until the router says stop."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """This side's part of the report."""
        return {}


def main(role: str, fd: int, parent: int, rank: int) -> None:
    """Runs a worker over the socket `fd` until the router stops it or goes away."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(_FAILED_STATUS)
    # The router tells which worker is gone; that links notice it too is no news.
    logging.getLogger("kvlink").setLevel(logging.ERROR)
    channel = Channel(Connection(fd), on_close=lambda: os._exit(_FAILED_STATUS))
    try:
        (setup,) = channel.take(_SETUP_S)
        worker = _make(role, rank, setup, channel)
        channel.send("ready", address=worker.endpoint.address.hex())
        worker.serve()
        channel.send("stats", **worker.stats())
        worker.endpoint.close()
    except Exception as error:
        if not isinstance(error, KVLinkError):
            import traceback

            traceback.print_exc()
        channel.send("failed", error=f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        os._exit(_FAILED_STATUS)


def _make(role: str, rank: int, setup: Message, channel: Channel) -> Worker:
    if role == "prefill":
        from kvlink.serving.prefill import PrefillWorker

        return PrefillWorker(role, rank, setup, channel)
    from kvlink.serving.decode import DecodeWorker

    return DecodeWorker(role, rank, setup, channel)
