"""A decode worker in this process, one call at a time, and the prefill side of its grants."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from alone import Alone

from kvlink.serving.batch import Batch, Chunk
from kvlink.serving.decode import DecodeWorker
from kvlink.serving.options import Options, SideOptions
from kvlink.serving.request import Request
from kvlink.serving.sampling import Sampling
from kvlink.transfer import Endpoint

SECRET = bytes(range(32))


class Wire:
    """A channel whose router is the test."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.inbox: list[dict[str, Any]] = []

    def send(self, kind: str, **fields: Any) -> None:
        self.sent.append(json.loads(json.dumps({"type": kind, **fields})))

    def take(self, timeout: float) -> list[dict[str, Any]]:
        taken, self.inbox = self.inbox, []
        return taken


class Serving:
    """A decode worker in this process, one call at a time, and the prefill side of its grants."""

    def __init__(self, path: Path) -> None:
        side = SideOptions(page_size=16, num_pages=64)
        options = Options(str(path), dtype="float32", prefill=side, decode=side)
        self.wire: Any = Wire()
        setup = {"options": options.to_message(), "secret": SECRET.hex()}
        self.worker = DecodeWorker("decode", 0, setup, self.wire)
        self.alone = Alone(path, side)
        self.endpoint = Endpoint("prefill", secret=SECRET)
        self.endpoint.register(self.alone.pool)
        self.link = self.endpoint.connect(self.worker.endpoint.address)
        self.num_layers = self.alone.config.num_layers
        self.pages = np.arange(self.alone.pool.num_pages, dtype=np.int32)

    def close(self) -> None:
        self.endpoint.close()
        self.worker.endpoint.close()

    def deliver(self, kind: str, **fields: Any) -> None:
        self.wire.inbox.append({"type": kind, **fields})
        self.worker.receive(0.0)

    def admit(self, index: int, prompt: list[int], num_tokens: int = 6) -> None:
        request = Request(index, prompt, num_tokens, Sampling())
        self.deliver("admit", request=request.to_message())

    def granted(self) -> dict[str, Any]:
        """The newest grant that was sent."""
        self.worker.grant()
        return [message for message in self.wire.sent if message["type"] == "granted"][-1]

    def prefill(self, grant: dict[str, Any], prompt: list[int]) -> Any:
        """Computes the KV and tells the first token; the transfer is begun, nothing pushed."""
        pages = self.pages[grant["start"] // 16 : -(-len(prompt) // 16)]
        transfer = self.link.begin(pages, base64.b64decode(grant["grant"]))
        batch = Batch.of([Chunk(prompt, 0, self.pages, True)], 16)
        token = int(self.alone.model(batch, self.alone.pool)[0].argmax())
        names = {"index": grant["index"], "attempt": grant["attempt"]}
        self.deliver("prefilled", **names, token=token, at=0.0)
        return transfer

    def push_all(self, transfer: Any) -> None:
        for layer in range(self.num_layers):
            transfer.push_layer(layer)
        transfer.finish()
        transfer.wait_source_reusable(10)

    def start(self, index: int, prompt: list[int]) -> None:
        """A request that is decoding."""
        self.admit(index, prompt)
        self.push_all(self.prefill(self.granted(), prompt))
        self.worker.collect_arrivals()
        assert index in [job.request.index for job in self.worker.scheduler.running]

    def finish(self) -> dict[int, list[int]]:
        """Decodes to the end; the tokens of each request."""
        while self.worker.scheduler.running or self.worker.scheduler.arriving:
            self.worker.collect_arrivals()
            self.worker.run()
        ended = [message for message in self.wire.sent if message["type"] == "finished"]
        return {message["index"]: message["token_ids"] for message in ended}

    def expected(self, prompt: list[int]) -> list[int]:
        return self.alone.generate({"prompt_token_ids": prompt, "max_new_tokens": 6})
