"""`Lane`: a survivor and its current peer. Runs scenarios one by one and audits after each."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

from kvlink.testing.faults.dance import GONE, Dance
from kvlink.testing.faults.mishaps import FaultyParty
from kvlink.testing.faults.peer import PeerDied, PeerProcess
from kvlink.testing.faults.scenario import MOVES, Scenario, draw
from kvlink.testing.faults.tuning import tune
from kvlink.testing.faults.watched import eventually, holdings
from kvlink.transfer import TransferError

_OWNER_STEPS = {"push": "wait", "pull": "released", "adopt": "released"}
_MOVER_STEPS = {"push": "arrived", "pull": "arrived", "adopt": "read"}
_MUST_END_AS = {
    "none": {"OK"},
    "full": {"OK"},
    "flip": {"DigestMismatch"},
    "reuse": {"GenerationMismatch"},
}
BACK_BOUND = 30.0  # s, until a link finds its peer again
PEER_LIFE = 100  # faults, after which a peer ends in order and its exit code counts


@dataclass
class Verdict:
    """What came of one seed. `problems` is empty when everything held."""

    seed: int
    kind: str
    move: str
    outcome: str
    seconds: float
    problems: list[str] = field(default_factory=list)
    steps: dict[str, str] = field(default_factory=dict)


class Lane:
    """One process of a campaign."""

    def __init__(self, path: str) -> None:
        tune()
        self.path = path
        self.survivor = FaultyParty("survivor", path)
        self.peer: PeerProcess | None = None
        self._whereabouts: dict[str, bytes] = {}
        self._age = 0
        self._most: dict[str, int] | None = None
        problems: list[str] = []
        for move in MOVES[: 3 if path == "host_shm" else 2]:  # what is made once and kept
            for owner in ("survivor", "peer"):
                problems += self._serve(move, owner, "large", 0)
        if problems:
            raise RuntimeError(f"nothing works here: {problems}")
        self._hold_nothing()

    def run(self, seed: int) -> Verdict:
        """One scenario, from the first step to the audit."""
        scenario = draw(seed, self.path)
        began = time.monotonic()
        dance = Dance(scenario, self.survivor, self._living_peer(), self._whereabouts)
        dance.run()
        problems = dance.problems
        problems += self._token_of_a_dead_session(scenario, dance)
        problems += self._settle(dead=scenario.deadly)
        if dance.tap is not None:
            dance.tap.close()
        problems += check_outcomes(scenario, dance.outcomes, late=dance.late)
        problems += self._serve("push", scenario.owner, "same", seed)
        problems += self._hold_nothing()
        self._age += 1
        if self._age > PEER_LIFE:
            problems += self._retire()
        steps = {" ".join(key): value for key, value in dance.outcomes.items()}
        outcome = outcome_of(scenario, dance.outcomes)
        seconds = time.monotonic() - began
        return Verdict(seed, scenario.kind, scenario.move, outcome, seconds, problems, steps)

    def close(self) -> list[str]:
        """Ends both sides in order."""
        problems = self._retire()
        self.survivor.close()
        return problems

    # --- the peer -----------------------------------------------------------------------------

    def _living_peer(self) -> PeerProcess:
        if self.peer is None:
            self.peer = PeerProcess("peer", self.path)
            self._age = 0
        return self.peer

    def _retire(self) -> list[str]:
        peer, self.peer = self.peer, None
        if peer is None:
            return []
        code = peer.end()
        return [f"crash: the peer's exit code was {code}"] if code else []

    def _settle(self, *, dead: bool) -> list[str]:
        """Both sides end what they had, and are audited; one that was killed is buried."""
        peer = self.peer
        if peer is not None and dead:
            peer.kill()
            code = peer.bury()
            self.peer = None
            assert code == -9, code
        # Both give up before either is audited: each may wait for the other.
        problems = []
        self.survivor.give_up()
        if self.peer is not None:
            try:
                problems += [f"peer: {each}" for each in self.peer.call("settle")]
            except PeerDied as error:
                problems.append(f"crash: the peer ended while it settled: {error}")
                self.peer.kill()
                self.peer.bury()
                self.peer = None
        return problems + self.survivor.settle()

    def _token_of_a_dead_session(self, scenario: Scenario, dance: Dance) -> list[str]:
        """After a restart: what the old session lent is refused, or still holds, but typed."""
        if scenario.kind != "restart":
            return []
        assert self.peer is not None
        self.peer.kill()
        self.peer.bury()
        self.peer = PeerProcess("peer", self.path)
        link = self.survivor.link
        calm = replace(scenario, kind="none")
        again = Dance(calm, self.survivor, self.peer, self._whereabouts)
        self.survivor.be_patient(True)
        again.token = dance.token
        problems: list[str] = []
        steps = {"connect", "accept", "begin"}
        if scenario.dialer == "survivor" and link is not None:
            steps.remove("connect")
            try:
                link.wait_connected(BACK_BOUND)
            except TransferError as error:
                problems.append(f"the link did not connect to the restarted peer: {error}")
            if link.num_sessions < 2 or link.peer_epoch == dance.epoch:
                problems.append("the link is still in the session of the peer that died")
        if not dance.token:
            return problems
        if scenario.mover == "survivor":
            self.survivor.end_job()
        for step in again.steps():
            if step[0] in steps:
                again.do(*step)
        told = again.outcomes.get((scenario.mover, "begin"))
        if scenario.owner == "peer" and told != "UnknownRegion":
            problems.append(f"a token of a dead session: expected UnknownRegion; got {told}")
        return problems + again.problems

    # --- audits -------------------------------------------------------------------------------

    def _serve(self, move: str, owner: str, shape: str, seed: int) -> list[str]:
        """A request on a new link, without any fault."""
        shapes = dict.fromkeys(("survivor", "peer"), shape)
        scenario = replace(
            draw(seed, self.path), kind="none", at="", move=move, owner=owner, shapes=shapes,
            seed=seed + 10**9, ttl=30.0,
        )  # fmt: skip
        dance = Dance(scenario, self.survivor, self._living_peer(), self._whereabouts)
        dance.run()
        wrong = {step: each for step, each in dance.outcomes.items() if each != "OK"}
        problems = [f"the survivor does not serve: {wrong}"] if wrong else []
        return problems + dance.problems + self._settle(dead=False)

    def _hold_nothing(self) -> list[str]:
        """Descriptors, threads and mapped memory are what they were."""
        now: dict[str, int] = {}

        def back() -> bool:
            nonlocal now
            self.survivor.drain()
            now = holdings()
            return self._most is None or all(now[k] <= self._most[k] for k in now)

        def collected() -> bool:
            gc.collect()  # each time: what ends late is garbage late
            return back()

        if not eventually(back, 0.1):
            eventually(collected)
        if self._most is None:
            gc.collect()
            self._most = holdings()
            return []
        grown = {k: f"{self._most[k]} -> {now[k]}" for k in now if now[k] > self._most[k]}
        if not grown:
            return []
        self._most = now
        return [f"leak: {grown}"]


def outcome_of(scenario: Scenario, outcomes: dict[tuple[str, str], str]) -> str:
    """How the transfer ended for the survivor."""
    steps = _OWNER_STEPS if scenario.owner == "survivor" else _MOVER_STEPS
    for step in (steps[scenario.move], "begin", "lend", "register", "accept", "connect"):
        told = outcomes.get(("survivor", step))
        if told not in (None, "TransferTimeout") or (told and step == steps[scenario.move]):
            return str(told)
    return GONE


def check_outcomes(
    scenario: Scenario, outcomes: dict[tuple[str, str], str], *, late: bool
) -> list[str]:
    """What the contract says about the outcomes of this kind of fault."""
    owner = outcomes.get((scenario.owner, _OWNER_STEPS[scenario.move]))
    mover = outcomes.get((scenario.mover, _MOVER_STEPS[scenario.move]))
    problems = []
    if scenario.move == "push" and mover == "OK" and owner not in ("OK", GONE, "(stopped)"):
        problems.append(f"the mover was told of an arrival that the owner calls {owner}")
    if late and owner == "GrantExpired":
        return problems
    struck = scenario.kind in ("expire", "late")
    if struck and scenario.move == "push":
        want = {"expire": "GrantExpired", "late": "GrantRevoked"}[scenario.kind]
        if owner != want:
            problems.append(f"{scenario.kind}: expected {want} at the owner; got {owner}")
    allowed = _MUST_END_AS.get(scenario.kind)
    deciding = owner if scenario.move == "push" else mover
    if allowed and deciding not in allowed:
        problems.append(f"{scenario.kind}: expected {sorted(allowed)}; got {deciding}")
    return problems


def run_lane(connection: Any, path: str, world: int) -> None:
    """The process of a lane: seeds come in, verdicts go out."""
    if world:
        os.environ["UCX_TLS"] = "tcp"
    if world == 2:
        os.environ["KVLINK_UCX_PUT_OVER_TCP"] = "1"
    import faulthandler
    import signal

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    lane = Lane(path)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while (seed := connection.recv()) is not None:
            connection.send(lane.run(seed))
    connection.send(lane.close())
