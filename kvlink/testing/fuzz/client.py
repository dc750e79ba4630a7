"""A client that is no endpoint: it goes as far as it wants to, and then says what it likes."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections import Counter
from typing import Any

from kvlink import _C
from kvlink.testing.fuzz.mutations import Talk, hard, must_be_refused
from kvlink.testing.transfer_peer import SECRET
from kvlink.transfer import wire
from kvlink.transfer.address import Address
from kvlink.transfer.channel import Channel, PeerGone
from kvlink.transfer.errors import ProtocolError, TransferError
from kvlink.transfer.fds import close_fds
from kvlink.transfer.framing import pack_frame
from kvlink.transfer.paths import host_shm
from kvlink.transfer.tls import Credentials

STAGES = {"before TLS": 15, "in TLS": 20, "after WELCOME": 15, "session": 50}
_PATIENCE = 5.0  # s
_MAX_SOFT = 40


def _never() -> bool:
    return False


class Fuzzer:
    """One connection after another. `counts`: frames by stage and mutation; `problems`."""

    def __init__(self, address: bytes, seed: int) -> None:
        self._where = Address.from_bytes(address).unix
        self._choose = random.Random(seed)
        self._credentials = Credentials(SECRET)
        self._control = _C.Control.create(2, 16)
        self._path = host_shm.HostShm(self._control)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def run(self, num_frames: int) -> None:
        """Until that many mutated frames were sent."""
        while self.counts.total() < num_frames and not self.problems:
            stage = self._choose.choices(list(STAGES), list(STAGES.values()))[0]
            sock = self._knock()
            try:
                if stage == "before TLS":
                    self._before_tls(sock)
                else:
                    self._inside(sock, stage)
            except (PeerGone, ProtocolError) as error:
                self.problems.append(f"{stage}: a good frame was refused: {error}")
            finally:
                sock.close()

    def _knock(self) -> socket.socket:
        end = time.monotonic() + _PATIENCE
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(_PATIENCE)
            assert self._where is not None
            try:
                sock.connect(b"\0" + self._where.encode())
                return sock
            except BlockingIOError:  # the backlog is full for a moment
                sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.001)

    def _before_tls(self, sock: socket.socket) -> None:
        tls = self._credentials.begin(server_side=False)
        tls.shake()
        data = bytearray(tls.pending())
        what = self._choose.choice(("hello flipped", "hello cut", "frame", "noise"))
        if what == "hello flipped":
            for _ in range(self._choose.choice((1, 2, 30))):
                data[self._choose.randrange(len(data))] ^= 1 << self._choose.randrange(8)
        elif what == "hello cut":
            del data[self._choose.randrange(len(data)) :]
        elif what == "frame":
            data[:] = hard(self._choose, 0)[1]
        else:
            data[:] = self._choose.randbytes(self._choose.choice((1, 7, 300, 20000)))
        sock.settimeout(_PATIENCE)
        with contextlib.suppress(OSError):  # it is refused while it is still being said
            sock.sendall(data)
        self.counts[f"before TLS, {what}"] += 1

    def _greet(self, channel: Channel, stage: str) -> int:
        """A good handshake, as far as the stage goes; the next frame's sequence number."""
        channel.shake_until(time.monotonic() + _PATIENCE, _never)
        if stage == "in TLS":
            return 0
        channel.send(wire.Hello(2, 2, bytes(16), "fuzz", (("host_shm", ""),)))
        wire.expect(self._receive(channel), wire.Welcome)
        describe = wire.expect(self._receive(channel), wire.Describe)
        for _ in range(describe.num_regions):
            wire.expect(self._receive(channel), wire.RegionFrame)
        if stage == "session":
            blob, fds = self._path.describe(0)
            channel.send(wire.Describe(describe.bit, 0, blob), fds)
            wire.expect(self._receive(channel), wire.Ready)
        return 1

    def _inside(self, sock: socket.socket, stage: str) -> None:
        channel = Channel(sock, self._credentials.begin(server_side=False))
        sequence = self._greet(channel, stage)
        if stage == "session":
            sequence = self._softly(channel)
        name, data = hard(self._choose, sequence)
        self.counts[f"{stage}, {name}"] += 1
        channel.send_bytes(data)
        if must_be_refused(data, sequence, stage):
            self._refused(channel, f"{stage}, {name}: {data[:64].hex()}", told=stage != "session")

    def _softly(self, channel: Channel) -> int:
        """Frames that are taken, and a question whose answer shows that they were."""
        number = 2 + min(_MAX_SOFT, int(self._choose.expovariate(0.2)))
        talk = Talk(self._choose)
        for sequence in range(2, 2 + number):
            channel.send_bytes(talk.next(sequence))
        self.counts["session, values"] += number
        mark = self._choose.getrandbits(64)
        channel.send_bytes(pack_frame(wire.Query(mark, bytes(16)), 2 + number))
        while True:
            frame = self._receive(channel)
            if isinstance(frame, wire.Reply) and frame.request == mark:
                return 3 + number

    def _refused(self, channel: Channel, what: str, *, told: bool) -> None:
        """A frame outside the schema: the connection ends; during a handshake, with a reason."""
        refusal = None
        try:
            while True:
                frame = self._receive(channel)
                refusal = frame if isinstance(frame, wire.Refuse) else refusal
        except PeerGone:
            if told and refusal is None:
                self.problems.append(f"no reason was told for {what}")
        except TimeoutError:
            self.problems.append(f"taken although it is outside the schema: {what}")
        except TransferError as error:
            self.problems.append(f"the answer is no frame: {error}; after {what}")

    def _receive(self, channel: Channel) -> wire.Frame:
        frame, fds = channel.receive_until(time.monotonic() + _PATIENCE, _never)
        close_fds(fds)
        return frame


def run_fuzzer(connection: Any, address: bytes, seed: int, num_frames: int) -> None:
    """A process of the campaign: reports as it goes, and ends when told (or done)."""
    fuzzer = Fuzzer(address, seed)
    step = max(1, min(2000, num_frames))
    while fuzzer.counts.total() < num_frames and not fuzzer.problems:
        try:
            fuzzer.run(min(num_frames, fuzzer.counts.total() + step))
        except Exception as error:
            fuzzer.problems.append(f"{type(error).__name__}: {error}")
        connection.send((dict(fuzzer.counts), fuzzer.problems))
    connection.send(None)
