"""KV-cache transfer and paged attention over one description of the cache."""

from kvlink.layout import KVLayout, Shard
from kvlink.pool import KVPool

__all__ = ["KVLayout", "KVPool", "Shard"]
