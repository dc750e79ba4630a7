"""File descriptors that go with frames."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from kvlink.transfer.errors import ProtocolError

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of OSErrors: too little of something here


def copies_of(fds: Iterable[int]) -> list[int]:
    """Duplicates of all of them, or OSError and none."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        close_fds(copies)
        raise
    return copies


def close_fds(fds: Iterable[int]) -> None:
    """Closes descriptors that came with a frame."""
    for fd in fds:
        os.close(fd)


def require_no_fds(fds: list[int]) -> None:
    """Raises ProtocolError when there are any, and closes them."""
    close_fds(fds)
    if fds:
        raise ProtocolError("frame: descriptors where there should be none")
