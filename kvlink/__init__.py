"""KV-cache transfer and paged attention over one description of the cache."""

from typing import TYPE_CHECKING, Any

from kvlink.attention import merge_states, paged_attention
from kvlink.cache_ops import append_kv, copy_pages, digest_pages, relayout_pages
from kvlink.layout import KVLayout, Shard
from kvlink.pool import KVPool
from kvlink.rope import Rope, apply_rope, rope_table

if TYPE_CHECKING:
    from kvlink.pages import PageAllocator
    from kvlink.transfer import Endpoint

__all__ = [
    "Endpoint",
    "KVLayout",
    "KVPool",
    "PageAllocator",
    "Rope",
    "Shard",
    "append_kv",
    "apply_rope",
    "copy_pages",
    "digest_pages",
    "merge_states",
    "paged_attention",
    "relayout_pages",
    "rope_table",
]

# Imported on first use, so that `import kvlink` loads neither numpy nor anything it does not need.
_LAZY = {"Endpoint": "kvlink.transfer", "PageAllocator": "kvlink.pages"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvlink' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
