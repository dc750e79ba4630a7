"""Errors that do not belong to a transfer (those are in `kvlink.transfer.errors`)."""

from __future__ import annotations


class KVLinkError(Exception):
    """Base of every error raised by kvlink."""


class InvalidArgument(KVLinkError, ValueError):
    """A value that was passed is wrong; the message names it, what was expected and what came."""


class Unsupported(KVLinkError, NotImplementedError):
    """Meaningful, but not available here; the message tells what is missing and what there is."""


class PageTableError(KVLinkError, IndexError):
    """A page table entry that would be read is unmapped (-1) or names no page of the pool."""


class NotReady(KVLinkError, TimeoutError):
    """KV that an operator waited for was not there in time; it may still come."""


class NeverReady(KVLinkError):
    """KV that an operator waited for will not come: its transfer has failed."""


class PageError(KVLinkError):
    """Base of the page allocator's errors."""


class OutOfPages(PageError):
    """Fewer pages are free than were asked for; nothing was allocated."""


class DoubleFree(PageError):
    """A page that is already free was released; nothing was released."""


class ForeignPage(PageError):
    """A page id that this allocator does not manage."""


class NotAllocated(PageError):
    """A free page was used as if it were allocated."""
