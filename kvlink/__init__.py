"""KV-cache transfer and paged attention over one description of the cache."""

import importlib.util
from typing import TYPE_CHECKING, Any

from kvlink.layout import KVLayout, Shard

# Where nothing is compiled there are layouts and kvlink.triton; the rest says so when it is used.
_COMPILED = importlib.util.find_spec("kvlink._C") is not None
if TYPE_CHECKING or _COMPILED:
    from kvlink.attention import paged_attention
    from kvlink.attention_merge import merge_states
    from kvlink.attention_plan import plan_attention
    from kvlink.cache_ops import append_kv, copy_pages, digest_pages, relayout_pages
    from kvlink.pool import KVPool
    from kvlink.rope import Rope, apply_rope, rope_table

if TYPE_CHECKING:
    from kvlink.cuda_array import from_cuda_array
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
    "from_cuda_array",
    "merge_states",
    "paged_attention",
    "plan_attention",
    "relayout_pages",
    "rope_table",
]

# Imported on first use, so that `import kvlink` loads neither numpy nor anything it does not need.
_LAZY = {
    "Endpoint": "kvlink.transfer",
    "PageAllocator": "kvlink.pages",
    "from_cuda_array": "kvlink.cuda_array",
}


def __getattr__(name: str) -> Any:
    if name in __all__ and not _COMPILED:
        raise ImportError(
            f"kvlink.{name} needs kvlink._C, which is not built here; kvlink.triton does without"
        )
    if name not in _LAZY:
        raise AttributeError(f"module 'kvlink' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
