"""One transfer, step by step, with its fault: who does what, and what came of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from kvlink.errors import KVLinkError, OutOfPages
from kvlink.testing.faults import frames
from kvlink.testing.faults.mishaps import FaultyParty
from kvlink.testing.faults.peer import PeerDied, PeerFailed, PeerProcess, Remote
from kvlink.testing.faults.scenario import Scenario
from kvlink.testing.faults.tap import Tap
from kvlink.transfer import TransferError

CONNECT_TIMEOUT, PATIENCE = 0.7, 30.0  # s
GONE, STOPPED, SKIPPED = "(gone)", "(stopped)", "(skipped)"


def _names(kind: type[Exception]) -> set[str]:
    return {kind.__name__}.union(*(_names(each) for each in kind.__subclasses__()))


TYPED = _names(TransferError) | {OutOfPages.__name__}


class Dance:
    """Runs a scenario's steps on a party here and a peer elsewhere.

    `outcomes`: (side, step) -> "OK", the name of a typed error, or why it did not run.
    """

    def __init__(
        self,
        scenario: Scenario,
        survivor: FaultyParty,
        peer: PeerProcess,
        whereabouts: dict[str, bytes],
    ) -> None:
        self.scenario, self.survivor, self.peer = scenario, survivor, peer
        self.outcomes: dict[tuple[str, str], str] = {}
        self.problems: list[str] = []
        self.token = b""
        # The survivor asks each time: a peer that restarts is somewhere else.
        self.address: dict[str, Any] = {
            "survivor": survivor.address(), "peer": lambda: whereabouts["peer"],
        }  # fmt: skip
        whereabouts["peer"] = peer.address
        self.tap: Tap | None = None
        if scenario.kind.startswith("wire "):
            end = self._other(scenario.dialer)
            target = peer.address if end == "peer" else survivor.address()
            self.tap = Tap(
                target, scenario.kind[5:], scenario.offset,
                of_dialer=scenario.spoiler == scenario.dialer,
            )  # fmt: skip
            self.address[end] = self.tap.address
        self.late = False  # a slow machine: the deadline passed before the outcome was there
        self.epoch = b""  # of the peer
        self._lent_at = time.monotonic()
        self._fired = False
        self._unread = 0  # results that a stopped peer has not given yet
        self._dead = False
        timeout = scenario.ttl + 0.5
        patience = PATIENCE if scenario.patient else CONNECT_TIMEOUT
        pending = scenario.kind in ("flip", "reuse", "cancel")  # an offer stays for the next reader
        self._args: dict[str, Callable[[], tuple[Any, ...]]] = {
            "connect": lambda: (self.address[self._other(scenario.dialer)], patience),
            "accept": lambda: (patience,),
            "lend": lambda: (scenario.shapes[scenario.owner], scenario.seed, scenario.ttl),
            "begin": lambda: (self.token, scenario.shapes[scenario.mover], scenario.seed),
            "wait": lambda: (timeout,),
            "arrived": lambda: (timeout,),
            "reusable": lambda: (timeout,),
            "released": lambda: (0.02 if pending else timeout,),
        }

    # --- steps --------------------------------------------------------------------------------

    def run(self) -> None:
        """Every step, and the fault where the scenario has it."""
        sc = self.scenario
        self.survivor.be_patient(sc.patient)
        self.peer.call("be_patient", sc.patient)
        if sc.kind.startswith("frame "):
            self._arm()
        for name, side, call in self.steps():
            if name == sc.at and not self._fired:
                self._fired = True
                if sc.kind in ("kill", "restart", "stop"):
                    self._strike(name, side, call)
                    continue
                self._inject()
            self.do(name, side, call)
        self.resume()
        if sc.kind.startswith("frame "):
            self._disarm()

    def steps(self) -> list[tuple[str, str, str]]:
        """(step, side, the party's method)."""
        sc = self.scenario
        owner, mover = sc.owner, sc.mover
        steps = [("connect", sc.dialer, "connect")]
        if sc.dialer != mover:
            steps.append(("accept", mover, "accept"))
        lend = "grant" if sc.move == "push" else "offer"
        steps += [("register", mover, "register"), ("lend", owner, lend)]
        begin = {"push": "begin", "pull": "begin_pull", "adopt": "adopt"}[sc.move]
        steps.append(("begin", mover, begin))
        if sc.move == "adopt":
            steps += [("read", mover, "read"), ("release", mover, "release")]
        else:
            post = "layer" if sc.move == "push" else "part"
            steps += [(f"layer {i}", mover, post) for i in sc.layers]
            steps.append(("finish", mover, "finish"))
        if sc.move == "push":
            steps += [("reusable", mover, "reusable"), ("wait", owner, "wait")]
        if sc.move != "adopt":
            steps.append(("arrived", mover, "arrived"))
        if sc.move != "push":
            steps.append(("released", owner, "released"))
        return [*steps, ("close", "peer", "close_link")]

    def do(self, name: str, side: str, call: str) -> Any:
        """One step; its outcome is noted."""
        if side == "peer" and (self._dead or self.peer.stopped):
            self.outcomes[side, name] = GONE if self._dead else STOPPED
            return None
        args = self._arguments(name)
        result = self._note(side, name, lambda: self._call(side, call, args))
        if name == "lend" and result is not None:
            self.token, self._lent_at = result, time.monotonic()
        if name == "connect" and self.survivor.link is not None:
            self.epoch = self.survivor.link.peer_epoch
        if name in ("wait", "arrived", "read"):
            self.late |= time.monotonic() - self._lent_at > self.scenario.ttl
        return result

    def _arguments(self, name: str) -> tuple[Any, ...]:
        if name.startswith("layer "):
            return (int(name[6:]),)
        return self._args.get(name, tuple)()

    def _call(self, side: str, call: str, args: tuple[Any, ...]) -> Any:
        if side == "peer":
            return self.peer.call(call, *args)
        return getattr(self.survivor, call)(*args)

    def _note(self, side: str, name: str, function: Callable[[], Any]) -> Any:
        """Runs it; a typed error is an outcome, anything else a problem."""
        try:
            result = function()
        except KVLinkError as error:
            kind = error.name if isinstance(error, Remote) else type(error).__name__
            if kind not in TYPED:
                self.problems.append(f"untyped: {side} {name}: {kind}: {error}")
            self.outcomes[side, name] = kind
            return None
        except PeerDied as error:
            self._dead = True
            self.outcomes[side, name] = GONE
            if not self.scenario.deadly:
                self.problems.append(f"crash: {side} {name}: the peer ended: {error}")
            return None
        except (PeerFailed, Exception) as error:
            self.outcomes[side, name] = type(error).__name__
            self.problems.append(f"untyped: {side} {name}: {type(error).__name__}: {error}")
            return None
        self.outcomes[side, name] = "OK"
        return result

    # --- faults -------------------------------------------------------------------------------

    def _strike(self, name: str, side: str, call: str) -> None:
        """The peer is killed or stopped before a step, or while it runs."""
        sc = self.scenario
        if not sc.during:
            self._signal()
            if sc.kind == "stop" and sc.brief:
                self._go_on()
            self.do(name, side, call)
        elif side == "survivor":
            timer = threading.Timer(sc.delay, self._signal)
            timer.start()
            self.do(name, side, call)
            timer.join()
        else:
            args = self._arguments(name)
            self.peer.start(call, *args)
            time.sleep(sc.delay)
            self._signal()
            self._unread = 1
            if sc.kind != "stop":
                result = self._note(side, name, self.peer.result)
                self._unread = 0
                if name == "lend" and result is not None:
                    self.token = result
            else:
                self.outcomes[side, name] = STOPPED
        if sc.kind == "stop":
            if sc.brief:
                self._go_on()
        else:
            self._dead = True

    def _go_on(self) -> None:
        time.sleep(self.scenario.delay)
        self.resume()

    def _signal(self) -> None:
        if self.scenario.kind == "stop":
            self.peer.stop()
        else:
            self.peer.kill()

    def resume(self) -> None:
        """A stopped peer goes on, and the call it was in ends."""
        if not self.peer.stopped:
            return
        self.peer.resume()
        if self._unread:
            self._unread = 0
            result = self._note("peer", self.scenario.at, self.peer.result)
            if self.scenario.at == "lend" and result is not None:
                self.token = result

    def _inject(self) -> None:
        """Every other fault that has its place between two steps."""
        sc = self.scenario
        if sc.kind == "expire":
            time.sleep(sc.ttl + 0.05)
        elif sc.kind == "late":
            self._extra(sc.owner, "revoke")
        elif sc.kind == "reuse":
            self._extra(sc.owner if sc.move == "push" else sc.mover, "reuse")
        elif sc.kind == "cancel":
            self._extra(sc.mover, "cancel")
        elif sc.kind == "close":
            self._extra("peer", "close_link")
        elif sc.kind == "flip":
            if sc.move == "pull":
                self._extra(sc.mover, "moved", sc.ttl)
            self._extra(sc.owner if sc.move == "push" else sc.mover, "flip", sc.seed)
        elif sc.kind == "full":
            told = self._extra(sc.owner, "fill_up")
            if set(told or ()) != {"OutOfSlots", "OutOfPages"}:
                self.problems.append(f"full: expected OutOfSlots and OutOfPages; got {told}")
        elif sc.kind.endswith("inside"):
            self._inside()

    def _inside(self) -> None:
        """The peer is inside the survivor's pages when it is killed or stopped."""
        self._extra("peer", "moved", self.scenario.ttl)
        entered = self._extra("peer", "enter", self.token)
        if entered != "OK":
            return
        if self.scenario.kind == "kill inside":
            self.peer.kill()
            self._dead = True
            return
        self.peer.stop()
        self._extra("survivor", "revoke")
        told = self._note("survivor", "(released)", lambda: self.survivor.released(0.05))
        if self.outcomes["survivor", "(released)"] != "TransferTimeout":
            self.problems.append(f"pages came back while a peer was inside: {told}")
        self.peer.resume()
        self._extra("peer", "leave", self.scenario.shapes["survivor"], self.scenario.seed + 1)

    def _extra(self, side: str, call: str, *args: Any) -> Any:
        """A call that is no step of the transfer."""
        if side == "peer" and self._dead:
            return None
        return self._note(side, f"({call})", lambda: self._call(side, call, args))

    def _arm(self) -> None:
        sc = self.scenario
        args = (sc.kind.removeprefix("frame "), sc.nth, sc.seed)
        if sc.spoiler == "survivor":
            frames.arm(*args)
        else:
            self.peer.call("arm", *args)

    def _disarm(self) -> None:
        if self.scenario.spoiler == "survivor":
            frames.disarm()
        elif not self._dead:
            self._extra("peer", "disarm")

    @staticmethod
    def _other(side: str) -> str:
        return "peer" if side == "survivor" else "survivor"
