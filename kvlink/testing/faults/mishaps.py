"""What a party does that no user of the library would, or should."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import random
import re
from collections import Counter
from typing import Any

from kvlink import _C
from kvlink.testing.faults import frames
from kvlink.testing.faults.party import NUM_SLOTS, Party
from kvlink.testing.faults.tuning import be_patient
from kvlink.testing.faults.watched import SPECS, TOKENS, eventually, holdings, memory, write_kv
from kvlink.transfer import Offer, TransferError, TransferTimeout
from kvlink.transfer.descriptor import Descriptor

logger = logging.getLogger("kvlink.transfer")


class FaultyParty(Party):
    """A party with the faults that happen between two of its steps."""

    _inside: Descriptor | None = None

    def flip(self, seed: int) -> None:
        choose = random.Random(seed)
        self.pools[self._job.shape].flip(int(choose.choice(list(self._job.pages))), choose)

    def moved(self, timeout: float) -> None:
        """Until every row that was posted has been moved: the mover is outside the pages."""
        transfer, job = self._transfer, self._job
        rows = job.posted * TOKENS[job.shape] * len(SPECS[job.shape].shard.kv_heads) * 2
        if not eventually(lambda: transfer.progress().num_rows == rows, timeout):
            raise TransferTimeout(f"expected {rows} rows; {transfer.progress().num_rows} are there")

    def be_patient(self, patient: bool) -> None:
        be_patient(patient)

    def arm(self, action: str, nth: int, seed: int) -> None:
        frames.arm(action, nth, seed)

    def disarm(self) -> bool:
        return frames.disarm()

    def enter(self, token: bytes) -> str:
        """Is inside the peer's pages, as a mover between two instructions of a chunk."""
        kind = _C.SlotKind.GRANT if token[6] == 1 else _C.SlotKind.OFFER
        descriptor = Descriptor.from_bytes(token, self.endpoint.descriptor_key, kind)
        told = str(self.open_link.path_link.enter(descriptor))
        self._inside = descriptor if told == "OK" else None
        return told

    def leave(self, shape: str, request: int) -> None:
        """Writes foreign KV into the pages it is inside of (a grant's), and leaves. Over ucx it is
        put there, if the transfer puts at all."""
        path_link, descriptor = self.open_link.path_link, self._inside
        assert descriptor is not None
        if descriptor.kind == _C.SlotKind.GRANT and self.open_link.path == "ucx":
            job = self._job
            self.pools[job.shape].put(job.pages, TOKENS[job.shape], request)
        elif descriptor.kind == _C.SlotKind.GRANT:
            pool, pages = path_link.mapped(descriptor)
            write_kv(pool, SPECS[shape], pages, descriptor.num_tokens, request)
        path_link.leave(descriptor)
        self._inside = None

    def fill_up(self) -> list[str]:
        """Takes every slot and every page there is; what the next request is told."""
        told = []
        page = self.pools["same"].take(1)
        offers: list[Offer] = []  # of one page, which any number may name
        for _ in range(NUM_SLOTS + 1):
            try:
                offers.append(self.endpoint.offer(page, 1, region=self.pools["same"].region))
            except TransferError as error:
                told.append(type(error).__name__)
        for offer in offers:
            offer.revoke()
        pool = self.pools["large"]
        held = pool.allocator.allocate(pool.allocator.num_free)
        try:
            self.grant("large", 0, 1.0)
        except Exception as error:
            told.append(type(error).__name__)
        pool.give(held)
        self.pools["same"].give(page)
        return told

    # --- between hosts ------------------------------------------------------------------------

    def path(self) -> tuple[str, str]:
        """How the link moves bytes, and over what."""
        return self.open_link.path, self.open_link.path_detail

    def wait_connected(self, timeout: float) -> int:
        """Until there is a session; how many there were."""
        self.open_link.wait_connected(timeout)
        return self.open_link.num_sessions

    def settle_pages(self) -> list[str]:
        """As `settle`, but the link stays."""
        link, self.link = self.link, None
        try:
            self.end_job()
            if not eventually(lambda: self.pages_out() == 0):
                self.problems.append("leak: pages are not back")
            return self.audit()
        finally:
            self.link = link

    def pages_out(self) -> int:
        """Pages that are not back."""
        return sum(pool.num_out for pool in self.pools.values())

    # --- under fuzzing ------------------------------------------------------------------------

    def has_link(self) -> bool:
        """There is one, and it is open."""
        return self.link is not None and not self.link.closed

    def watch_log(self) -> None:
        """From now on refusals are counted rather than printed."""
        self._log = CountingHandler()
        logger.addHandler(self._log)
        logger.propagate = False

    def logged(self) -> dict[str, Any]:
        """What was counted, and the first lines that no refusal explains."""
        return {"refusals": dict(self._log.refusals), "unexpected": self._log.unexpected[:5]}

    def held(self) -> dict[str, int]:
        """Descriptors, threads, mapped segments and memory of this process."""
        self.drain()
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc keeps what was freed, and that varies
            ctypes.CDLL(None).malloc_trim(0)
        return holdings() | memory()

    def memory(self) -> dict[str, int]:
        """As it is now, garbage included."""
        return memory()


_REFUSAL = re.compile(r"\b(\w*(?:Error|Mismatch|Refused|Unreachable|Unavailable))\b")


class CountingHandler(logging.Handler):
    """Refusals by the error that explains them; errors of any other kind as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals: Counter[str] = Counter()
        self.unexpected: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """On the service thread."""
        line = record.getMessage()
        if record.levelno >= logging.ERROR or record.exc_info:
            self.unexpected.append(self.format(record))
        elif found := _REFUSAL.search(line):
            self.refusals[found[1]] += 1
        elif " dropped: " in line:
            self.refusals["link dropped"] += 1
