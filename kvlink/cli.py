"""The `kvlink` command. Subcommands are imported when they are called, with what they need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Name -> module with `main(argv) -> int`, and what it does.
_COMMANDS = {
    "doctor": ("kvlink.doctor", "tell what this build and this machine can do"),
    "generate": ("kvlink.serving.cli", "generate text with a prefill and a decode process"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status. `argv` is without the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in _COMMANDS:
        module, _ = _COMMANDS[argv[0]]
        return int(importlib.import_module(module).main(argv[1:]) or 0)
    usage = "usage: kvlink COMMAND [--help]\n\n" + "\n".join(
        f"  {name:<10}{what}" for name, (_, what) in _COMMANDS.items()
    )
    if argv in (["-h"], ["--help"]):
        print(usage)
        return 0
    if argv:
        print(f"kvlink: no command {argv[0]!r}\n", file=sys.stderr)
    print(usage, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
