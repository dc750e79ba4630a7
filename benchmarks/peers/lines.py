"""What each side of a measured move speaks: a JSON line in on stdin, a JSON line out on stdout.

A request is `[command, argument, ...]`, a reply `{"ok": result}` or `{"error": text}`. Import it
first: it takes stdout, and what others print there goes to stderr. Needs only the standard
library, so that it runs in the environment of any peer.
"""

from __future__ import annotations

import json
import os
import random
import sys

# NOTE: before the library under test is imported, which may print as well.
_REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(commands: object) -> None:
    """Runs the methods of `commands` as they are asked for, until stdin ends."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            reply = {"ok": getattr(commands, name)(*arguments)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=_REPLIES, flush=True)


def scattered(num_pieces: int, seed: int) -> list[int]:
    """All pieces once, in an order that only the seed knows."""
    order = list(range(num_pieces))
    random.Random(seed).shuffle(order)
    return order
