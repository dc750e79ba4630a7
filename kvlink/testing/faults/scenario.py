"""What a seed draws: a transfer, a fault, and the step at which it strikes."""

from __future__ import annotations

import random
from dataclasses import dataclass

MOVES = ("push", "pull", "adopt")
NUM_LAYERS = 4
_LAYERS = tuple(f"layer {i}" for i in range(NUM_LAYERS))
STEPS = {
    "push": (
        "connect", "register", "lend", "begin", *_LAYERS, "finish", "reusable", "wait",
        "arrived", "close",
    ),
    "pull": (
        "connect", "register", "lend", "begin", *_LAYERS, "finish", "arrived", "released", "close",
    ),
    "adopt": ("connect", "register", "lend", "begin", "read", "release", "released", "close"),
}  # fmt: skip

# Kind of fault: (how often it is drawn, the transfers it is for).
KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "none": (2, MOVES),
    "kill": (22, MOVES),
    "kill inside": (4, ("push", "pull")),
    "restart": (6, MOVES),
    "stop": (10, MOVES),
    "stop inside": (6, ("push", "pull")),
    "frame drop": (4, MOVES),
    "frame duplicate": (4, MOVES),
    "frame delay": (4, MOVES),
    "frame reorder": (4, MOVES),
    "frame corrupt": (4, MOVES),
    "wire flip": (4, MOVES),
    "wire stall": (2, MOVES),
    "wire cut": (5, MOVES),
    "flip": (6, ("push", "pull")),
    "full": (3, MOVES),
    "expire": (5, MOVES),
    "late": (6, MOVES),
    "reuse": (4, ("push", "pull")),
    "cancel": (3, ("push", "pull")),
    "close": (3, MOVES),
}
_TTL = {"none": 20, "full": 20, "flip": 5, "reuse": 5, "late": 5}  # nothing waits for these
# On one host only the end of a peer, or of its part, ends a connection: a cut of which the peer
# does not know is between hosts.
_NOT_ON: dict[str, set[str]] = {"host_shm": {"wire cut"}, "ucx": set()}
# What ends a connection. A "stop inside" does not: the peer goes on.
_ENDING = {kind for kind in KINDS if kind.split()[0] in ("frame", "wire")} | {
    "kill", "kill inside", "restart", "stop", "close",
}  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """One fault. Equal for equal (seed, path)."""

    seed: int
    path: str
    kind: str
    move: str
    owner: str  # of the pages: "survivor" or "peer"
    dialer: str  # who connects
    shapes: dict[str, str]  # of either side's pool
    at: str  # the step
    during: bool  # while it runs, rather than before
    delay: float  # s, from the step's begin to the fault
    ttl: float  # s
    layers: tuple[int, ...]  # in which order they are posted
    brief: bool  # a stopped peer goes on within the deadline
    spoiler: str  # whose frames are spoilt
    nth: int  # which frame
    offset: int  # which byte of the connection

    @property
    def mover(self) -> str:
        """Who moves the bytes."""
        return "peer" if self.owner == "survivor" else "survivor"

    @property
    def patient(self) -> bool:
        """Nothing in it makes anybody wait in vain."""
        return self.kind in ("none", "full", "flip", "reuse")

    @property
    def deadly(self) -> bool:
        """The peer's process ends."""
        return self.kind in ("kill", "kill inside", "restart")


def world_of(path: str, seed: int) -> int:
    """Which processes run this seed. On ucx two of three go over TCP alone, where long runs are
    sent from where they lie (1), or put straight into the pages as over RDMA (2); the others have
    whatever UCX finds on this host (0).

    UCX aborts a process that cannot answer a put over TCP because the connection has just ended:
    faults that end one are not for (2).
    """
    world = seed % 3 if path == "ucx" else 0
    ends = draw(seed, path).kind in _ENDING
    return 1 if world == 2 and ends else world


def draw(seed: int, path: str) -> Scenario:
    """The scenario of a seed."""
    choose = random.Random(f"{path} {seed}")
    kinds = {kind: weight for kind, (weight, _) in KINDS.items() if kind not in _NOT_ON[path]}
    kind = choose.choices(list(kinds), list(kinds.values()))[0]
    moves = [move for move in KINDS[kind][1] if path == "host_shm" or move != "adopt"]
    move = choose.choice(moves)
    owner = choose.choice(("survivor", "peer"))
    if kind.endswith("inside"):
        owner = "survivor"  # the peer is the one inside
    shape = choose.choice(("same", "same", "relayout", "large"))
    shapes = dict.fromkeys(("survivor", "peer"), shape)
    if shape == "relayout":
        shapes[choose.choice(("survivor", "peer"))] = "same"
    if move == "adopt":
        shapes = dict.fromkeys(shapes, shapes[owner])
    layers = list(range(NUM_LAYERS))
    choose.shuffle(layers)
    return Scenario(
        seed=seed, path=path, kind=kind, move=move, owner=owner,
        dialer=choose.choice(("survivor", "peer")), shapes=shapes,
        at=choose.choice(_steps_for(kind, move)), during=choose.random() < 0.6,
        delay=choose.choice((0.0, 0.0002, 0.0005, 0.001, 0.002, 0.004)),
        ttl=choose.choice((0.2, 0.3, 0.5)) * _TTL.get(kind, 1),
        layers=tuple(layers), brief=choose.random() < 0.5,
        spoiler=choose.choice(("survivor", "peer")), nth=choose.choice((0, 0, 1, 1, 2, 3, 4, 5)),
        offset=choose.randrange(choose.choice((200, 1200, 2500, 4000))),
    )  # fmt: skip


def _steps_for(kind: str, move: str) -> tuple[str, ...]:
    steps = STEPS[move]
    first_use = steps.index("begin") + 1
    if kind in ("expire", "late"):
        last = {"push": "wait", "pull": "finish", "adopt": "release"}[move]
        return steps[first_use - 1 : steps.index(last) + 1]
    if kind in ("cancel", "kill inside", "stop inside"):
        return steps[first_use : steps.index("finish") + 1]
    if kind == "flip":
        return ("wait",) if move == "push" else ("finish",)
    if kind == "reuse":
        return steps[first_use : steps.index("wait" if move == "push" else "finish") + 1]
    if kind == "full":
        return ("lend",)
    if kind == "close":
        return steps[1:-1]
    return steps
