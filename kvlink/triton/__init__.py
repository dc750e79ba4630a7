"""The operators as Triton kernels: the same arguments and meaning, one file an operator.

They need torch and triton, and nothing compiled of kvlink: an engine without binaries describes its
cache by a `TensorPool`; a `KVPool` serves as well. `docs/triton.md` tells what they cover. With
TRITON_INTERPRET=1 in the environment they run on the CPU, slowly, for tests.
"""

from kvlink.triton.append_kv import append_kv
from kvlink.triton.apply_rope import apply_rope
from kvlink.triton.merge_states import merge_states
from kvlink.triton.paged_attention import paged_attention
from kvlink.triton.relayout_pages import copy_pages, digest_pages, relayout_pages
from kvlink.triton.tensor_pool import TensorPool

__all__ = [
    "TensorPool",
    "append_kv",
    "apply_rope",
    "copy_pages",
    "digest_pages",
    "merge_states",
    "paged_attention",
    "relayout_pages",
]
