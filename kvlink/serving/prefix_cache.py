"""`PrefixCache`: pages of prompts that other prompts beginning alike share, found by content."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvlink.pages import PageAllocator, WritablePages

_MAX_SIBLINGS = 64  # looked through for a page whose first tokens fit


@dataclass(eq=False)
class Landing:
    """Where the KV of new entries comes from: a transfer that has yet to be verified."""

    verified: bool = False
    failed: bool = False


@dataclass(eq=False)
class Entry:
    """A whole page of a prompt, which nobody writes to any more."""

    key: bytes  # of the page's tokens and all before
    parent: bytes
    tokens: tuple[int, ...]
    page: int
    landing: Landing | None  # None: written here
    step: int  # of the cache, when it was added


class Match(NamedTuple):
    """What a prompt has in common with earlier ones: `entries` are whole pages; `partial`, if
    given, is one more page, of which `num_tokens` has the first tokens only."""

    entries: list[Entry]
    partial: Entry | None
    num_tokens: int

    def whole(self, page_size: int) -> Match:
        """Without the page that fits in part."""
        return Match(self.entries, None, len(self.entries) * page_size)


@dataclass
class PrefixCache:
    """Keeps a reference to each of its pages; gives up those used longest ago that nobody else
    holds, when room is needed. Keys are chained hashes of token ids that begin with `root`: what
    else the KV depends on. Not thread-safe, but for the allocator that it shares.
    """

    allocator: PageAllocator
    root: bytes = b""
    enabled: bool = True
    step: int = 0  # what was added in this one may not be written yet
    _entries: OrderedDict[bytes, Entry] = field(default_factory=OrderedDict)  # oldest use first
    _children: defaultdict[bytes, dict[bytes, Entry]] = field(
        default_factory=lambda: defaultdict(dict)
    )

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self, prompt: Sequence[int]) -> list[bytes]:
        """One for each whole page of a prompt."""
        if not self.enabled:
            return []
        size, parent, keys = self.allocator.page_size, self.root, []
        tokens = np.asarray(prompt, np.int64)
        for end in range(size, len(prompt) + 1, size):
            parent = hashlib.sha256(parent + tokens[end - size : end].tobytes()).digest()
            keys.append(parent)
        return keys

    def match(self, prompt: Sequence[int], keys: Sequence[bytes], *, multiple: int = 0) -> Match:
        """The longest beginning that is here, short of the last token of the prompt.

        With `multiple`, a whole number of pages times it; else the last page may fit in part.
        """
        size, limit = self.allocator.page_size, len(prompt) - 1
        entries: list[Entry] = []
        for key in keys[: limit // size]:
            if (entry := self._entries.get(key)) is None:
                break
            entries.append(entry)
        if multiple:
            del entries[len(entries) // multiple * multiple :]
        num_tokens, partial = len(entries) * size, None
        if not multiple:
            partial, more = self._partial(
                entries, prompt[num_tokens : min(limit, num_tokens + size)]
            )
            num_tokens += more
        return Match(entries, partial, num_tokens)

    def reserve(self, match: Match, stop: int) -> tuple[Match, WritablePages] | None:
        """The pages of a sequence of `stop` tokens that begins so, and what of the match they
        have; None when there is no room.

        Those of the match gain a reference. Of the page that fits in part the sequence gets a copy
        of its own, which the caller makes (`src` to `dst`) before anything is written.
        """
        found = [*match.entries, *([match.partial] if match.partial else [])]
        held = self.allocator.fork([entry.page for entry in found], match.num_tokens)
        size = self.allocator.page_size
        if not self._make_room(-(-stop // size) - match.num_tokens // size):
            self.allocator.free(held)
            # The page to copy from takes room, too.
            return self.reserve(match.whole(size), stop) if match.partial else None
        for entry in reversed(found):  # the beginning of a prompt is given up last
            self._entries.move_to_end(entry.key)
        return match, self.allocator.prepare_write(held, match.num_tokens, stop)

    def add(
        self,
        prompt: Sequence[int],
        keys: Sequence[bytes],
        pages: NDArray[np.int32],
        landing: Landing | None = None,
    ) -> None:
        """The pages of the first `len(keys)` whole pages of a prompt; what is here already stays.

        They may be matched from now on: nobody reads them before they are written (`step`), or
        uses what was read before `landing` is verified.
        """
        size, new = self.allocator.page_size, []
        for idx, key in enumerate(keys):
            if key in self._entries:
                continue
            parent = keys[idx - 1] if idx else self.root
            tokens = tuple(prompt[idx * size : (idx + 1) * size])
            entry = Entry(key, parent, tokens, int(pages[idx]), landing, self.step)
            self._children[parent][key] = entry
            new.append(entry)
        self.allocator.retain([entry.page for entry in new])
        for entry in reversed(new):
            self._entries[entry.key] = entry

    def drop(self, landing: Landing) -> None:
        """A transfer has failed: what it was to bring is not here."""
        for entry in [entry for entry in self._entries.values() if entry.landing is landing]:
            self._remove(entry)

    def _partial(self, entries: list[Entry], tokens: Sequence[int]) -> tuple[Entry | None, int]:
        """The written page after `entries` of which most first tokens fit, and how many do."""
        best, most = None, 0
        parent = entries[-1].key if entries else self.root
        siblings = self._children.get(parent, {})
        for entry in islice(reversed(siblings.values()), _MAX_SIBLINGS):
            if entry.step == self.step or entry.landing is not None:
                continue
            common = 0
            for ours, theirs in zip(tokens, entry.tokens, strict=False):
                if ours != theirs:
                    break
                common += 1
            if common > most:
                best, most = entry, common
        return best, most

    def _make_room(self, num_pages: int) -> bool:
        missing = num_pages - self.allocator.num_free
        if missing <= 0:
            return True
        entries = list(self._entries.values())
        refcounts = self.allocator.refcount([entry.page for entry in entries])
        idle = [entries[idx] for idx in np.flatnonzero(refcounts == 1)]
        if len(idle) < missing:
            return False
        for entry in idle[:missing]:
            self._remove(entry)
        return True

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.key]
        siblings = self._children[entry.parent]
        del siblings[entry.key]
        if not siblings:
            del self._children[entry.parent]
        self.allocator.free([entry.page])
