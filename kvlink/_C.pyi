"""Written by tools/make_stubs.py from the built module; `make stubs` brings it up to date."""

from collections.abc import Sequence
from typing import Any, ClassVar

MAX_LINKS: int
MAX_STORED_LAYERS: int
UCX_BUILT: bool

class ArrayView:
    """Memory of a pool, exported through DLPack."""

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: Any = None,
        dl_device: Any = None,
        copy: Any = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: str | bytes,
        device: tuple[int, int],
        owner: Any,
    ) -> None: ...

class AttentionPlan:
    """How the work of calls is divided."""

    @property
    def num_tasks(self) -> int:
        """Pieces of work that threads take."""
    @property
    def shared_prefixes(self) -> list[tuple[list[int], int]]:
        """(sequences, leading tokens) read once for all of them."""

class Control:
    """Slots and page lists that peers map."""

    def adopt(self, key: SlotKey, bit: int) -> TransferStatus: ...
    def arrive(self, key: SlotKey, deadline_ns: int) -> TransferStatus: ...
    @staticmethod
    def attach(fd: int, num_bytes: int) -> Control: ...
    def close(self, key: SlotKey, status: TransferStatus) -> bool: ...
    @staticmethod
    def create(num_slots: int, num_page_entries: int) -> Control: ...
    def deadline_ns(self, key: SlotKey) -> int: ...
    def drop_link(self, bit: int) -> None: ...
    def enter(self, key: SlotKey, bit: int) -> TransferStatus:
        """What a writer does before each chunk; for fault injection."""
    def expire(self, key: SlotKey, now_ns: int) -> bool: ...
    def extend(self, key: SlotKey, deadline_ns: int) -> bool: ...
    @property
    def fd(self) -> int: ...
    def forget(self, key: SlotKey) -> None:
        """The pages of an ended slot may go."""
    def leave(self, key: SlotKey, bit: int) -> None: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_page_entries(self) -> int: ...
    def num_rows(self, key: SlotKey) -> int: ...
    @property
    def num_slots(self) -> int: ...
    def open(
        self,
        slot: int,
        kind: SlotKind,
        transfer_id: bytes,
        deadline_ns: int,
        num_layers: int,
        rows_per_layer: int,
        num_pulls: int,
        with_digest: bool,
        first_page: int,
        own: OwnPages,
    ) -> SlotKey: ...
    def page_list(self, first: int, count: int) -> Any:
        """A read-only int32 view; nothing is copied."""
    def quiet(self, key: SlotKey) -> bool: ...
    def readiness(self, key: SlotKey, layer: int, name: str | bytes) -> Readiness: ...
    def release(self, key: SlotKey, bit: int) -> bool: ...
    def status(self, key: SlotKey) -> TransferStatus: ...
    def unadopt(self, key: SlotKey, bit: int) -> bool: ...
    def wait_closed(self, key: SlotKey, deadline_ns: int) -> TransferStatus: ...
    def wait_layer(self, key: SlotKey, layer: int, deadline_ns: int) -> TransferStatus: ...

class Layout:
    """The C++ twin of kvlink.KVLayout."""

    def __init__(self, bytes: bytes) -> None: ...
    def k_offset(self, page: int, slot: int, head: int, dim: int) -> int: ...
    def k_scale_offset(self, page: int, slot: int, head: int) -> int: ...
    def to_bytes(self) -> bytes: ...
    def v_offset(self, page: int, slot: int, head: int, dim: int) -> int: ...
    def v_scale_offset(self, page: int, slot: int, head: int) -> int: ...

class MemoryProbe:
    """Two pieces of memory as pools have it; each call copies one to the other, or reads one, with num_threads() threads.
    """

    def __init__(self, num_bytes: int, shared: bool = False) -> None:
        """num_bytes: of each piece, in whole MiB. Tries which way of copying is the fastest here. Raises InvalidArgument, OSError.
        """
    @property
    def copied_by(self) -> str:
        """'streaming stores' or 'memcpy'."""
    def copy(self) -> float:
        """Copies in the fastest way; the seconds it took."""
    def copy_plain(self) -> float:
        """Copies by the C library's memcpy; the seconds it took."""
    @property
    def num_bytes(self) -> int: ...
    def read(self) -> float:
        """The seconds it took."""

class OwnPages:
    """The owner's pages of one grant or offer."""

    def __init__(
        self,
        pool: PoolView,
        model_layers: Sequence[int],
        model_head: int,
        pages: Any,
        num_tokens: int,
        generations: Any | None = None,
    ) -> None: ...
    @property
    def verify_ns(self) -> int: ...

class PageIds:
    """Page ids, int32: an array without a copy, or a sequence."""

    def __init__(self, pages: Any, name: str | bytes) -> None: ...
    def __len__(self) -> int: ...

class PoolView:
    """A pool as the operators see it."""

    def __init__(
        self,
        layout_bytes: bytes,
        layers: Sequence[Sequence[int]],
        num_pages: int,
        layer_map: Sequence[int],
        device: tuple[int, int],
        owner: Any,
    ) -> None: ...

class PostedTransfer:
    """The moving side of one transfer."""

    def cancel(self) -> None: ...
    def finish(self) -> None: ...
    def post(self, part: int, num_tokens: int) -> None: ...
    def post_all(self) -> None:
        """What is left of every part, and finish."""
    def progress(self) -> dict[str, Any]: ...
    def readiness(self, part: int, name: str | bytes) -> Readiness: ...
    def tokens_left(self, part: int) -> int: ...
    def wait_arrived(self, deadline_ns: int) -> TransferStatus: ...
    def wait_source_reusable(self, deadline_ns: int) -> bool: ...

class Readiness:
    """One layer of a transfer that is under way; Grant.readiness makes it."""

    @property
    def ready(self) -> bool:
        """All rows of the layer are there, not yet verified. Raises NeverReady."""
    def settle(self) -> None:
        """For the owner: the transfer has arrived and was verified."""
    def wait(self, timeout: float) -> None:
        """Until it is ready. Raises NotReady, NeverReady."""
    @property
    def waited_s(self) -> float:
        """Seconds that operators and `wait` have waited for it."""

class Segment:
    """Page-aligned, zeroed memory without a name."""

    @property
    def address(self) -> int: ...
    @staticmethod
    def attach(fd: int, num_bytes: int) -> Segment: ...
    @staticmethod
    def create(num_bytes: int, shared: bool) -> Segment: ...
    @property
    def fd(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class ShmLink:
    """A peer's control segment and the thread that moves pages."""

    def __init__(self, control: Control, bit: int) -> None: ...
    def begin(
        self,
        kind: SlotKind,
        slot: int,
        generation: int,
        parts: Sequence[Sequence[int]],
        heads: Sequence[int],
        own: PoolView,
        peer: PoolView,
        own_pages: Any,
        first_peer_page: int,
        num_peer_pages: int,
        num_tokens: int,
        generations: Any | None = None,
    ) -> Any:
        """A PostedTransfer, or the TransferStatus that tells why there is none."""
    def close(self, status: TransferStatus) -> None: ...
    @property
    def closed(self) -> bool: ...

class SlotKey:
    """One use of one slot."""

    def __init__(self, slot: int, generation: int) -> None: ...
    @property
    def generation(self) -> int: ...
    @property
    def slot(self) -> int: ...

class SlotKind:
    """What the owner of the pages opened."""

    GRANT: ClassVar[SlotKind]
    OFFER: ClassVar[SlotKind]
    def __index__(self, /) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self, /) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    __members__: ClassVar[dict[str, SlotKind]]

class TransferStatus:
    """How a transfer stands or ended."""

    BUSY: ClassVar[TransferStatus]
    CANCELLED: ClassVar[TransferStatus]
    DIGEST_MISMATCH: ClassVar[TransferStatus]
    EXPIRED: ClassVar[TransferStatus]
    GENERATION_MISMATCH: ClassVar[TransferStatus]
    MOVE_FAILED: ClassVar[TransferStatus]
    OK: ClassVar[TransferStatus]
    PEER_LOST: ClassVar[TransferStatus]
    PENDING: ClassVar[TransferStatus]
    REVOKED: ClassVar[TransferStatus]
    ROW_COUNT_MISMATCH: ClassVar[TransferStatus]
    STALE: ClassVar[TransferStatus]
    TIMEOUT: ClassVar[TransferStatus]
    def __index__(self, /) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self, /) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    __members__: ClassVar[dict[str, TransferStatus]]

class UcxFault:
    """What a fault test does to messages on their way."""

    DELAY: ClassVar[UcxFault]
    DROP: ClassVar[UcxFault]
    DUPLICATE: ClassVar[UcxFault]
    FLIP_BIT: ClassVar[UcxFault]
    def __index__(self, /) -> int: ...
    def __init__(self, value: int) -> None: ...
    def __int__(self, /) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    __members__: ClassVar[dict[str, UcxFault]]

class UcxHub:
    """An endpoint's UCX context and its threads."""

    def __init__(self, control: Control) -> None: ...
    def close(self) -> None: ...
    def forget(self, pool: PoolView) -> None:
        """Its memory is mapped for peers no more."""
    def open_link(self, bit: int) -> UcxLink: ...

class UcxLink:
    """One session with a peer over UCX."""

    def begin(
        self,
        kind: SlotKind,
        key: SlotKey,
        parts: Sequence[Sequence[int]],
        heads: Sequence[int],
        own: PoolView,
        own_pages: Any,
        peer_layout: bytes,
        peer_layers: int,
        peer_pages: int,
        num_tokens: int,
        generations: Any | None,
        deadline_ns: int,
    ) -> Any:
        """A PostedTransfer, or the TransferStatus that tells why there is none."""
    def close(self, status: TransferStatus) -> None: ...
    def connect(self, description: bytes, same_host: bool) -> None: ...
    def counters(self) -> dict[str, int]:
        """What only this path counts."""
    def describe(self) -> bytes: ...
    def enter(
        self,
        kind: SlotKind,
        key: SlotKey,
        model_layer: int,
        model_head: int,
        deadline_ns: int,
    ) -> TransferStatus:
        """Pins the pages and stays inside; for fault injection."""
    def failed(self) -> str: ...
    def inject(self, fault: UcxFault, count: int) -> None:
        """The next `count` messages that this side sends; FLIP_BIT waits for those with KV."""
    def leave(self) -> None: ...
    def transports(self) -> list[str]: ...

def append_kv(k: Any, v: Any, pool: PoolView, layers: Any, slots: Any, rope: Any = None) -> None:
    """`layers`: one layer or a sequence; `rope`: a kvlink.Rope or None."""

def apply_rope(x: Any, out: Any, rope: Any) -> None: ...

def convert(src: Any, src_dtype: str | bytes, dst: Any, dst_dtype: str | bytes) -> None:
    """Converts elements, given as contiguous uint8 arrays, one by one through float32."""

def digest_pages(
    *,
    pool: PoolView,
    pages: PageIds,
    layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    head: int,
    model_head: int,
    num_tokens: int,
    start: int,
    token_position: int,
) -> tuple[Any, ...]:
    """(rows, digest). Layers are stored layers."""

def merge_states(outs: Sequence[Any], lses: Sequence[Any], out: Any, lse: Any) -> None:
    """See kvlink.merge_states."""

def num_threads() -> int:
    """Threads the CPU operators use."""

def page_ids(pages: Any, num_pages: int) -> Any:
    """A copy of ids that are int32 already and all in [0, num_pages); None for others."""

def paged_attention(
    q: Any,
    pool: PoolView,
    layer: int,
    page_table: Any,
    seq_lens: Any,
    q_indptr: Any,
    page_indptr: Any,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    sinks: Any,
    alibi_slopes: Any,
    out: Any,
    lse: Any,
    ready: Sequence[Readiness] = (),
    ready_timeout: float = 0.0,
    q_positions: Any = None,
    mask: Any = None,
    mask_starts: Any = None,
    page_generations: Any = None,
    expected_generations: Any = None,
    plan: Any = None,
) -> None:
    """See kvlink.paged_attention; window 0 and softcap 0 mean none."""

def plan_attention(
    pool: PoolView,
    page_table: Any,
    seq_lens: Any,
    q_indptr: Any,
    page_indptr: Any,
    num_q_heads: int,
    causal: bool,
    window: int,
    max_seq_lens: Any,
) -> AttentionPlan:
    """See kvlink.plan_attention; window 0 means none."""

def probe_copy_bandwidth(num_bytes: int, seconds: float) -> float:
    """Bytes copied a second with num_threads() threads."""

def probe_dot_peak(seconds: float) -> float:
    """The same of products of pairs of bfloat16 with float32 sums, four operations each; 0 where there is no instruction for them.
    """

def probe_fma_peak(seconds: float) -> float:
    """float32 operations a second with num_threads() threads; an FMA is two."""

def probe_read_bandwidth(num_bytes: int, seconds: float) -> float:
    """Bytes read a second with num_threads() threads."""

def relayout_pages(
    *,
    src: PoolView,
    src_pages: PageIds,
    dst: PoolView,
    dst_pages: PageIds,
    src_layers: Sequence[int],
    dst_layers: Sequence[int],
    model_layers: Sequence[int],
    num_heads: int,
    src_head: int,
    dst_head: int,
    model_head: int,
    num_tokens: int,
    src_start: int,
    dst_start: int,
    token_position: int,
    digest: bool,
) -> tuple[Any, ...]:
    """(rows, digest). Layers are stored layers."""

def set_num_threads(count: int) -> None: ...

def set_simd_level(name: str | bytes) -> None: ...

def simd_level() -> str:
    """Level of the vector code in use: portable, avx2 or avx512."""

def supported_simd_levels() -> list[str]:
    """Levels that this build has and this CPU runs, lowest first."""

def tensor_info(
    object: Any,
    name: str | bytes,
) -> tuple[int, list[int], list[int], str, tuple[int, int], bool]:
    """(address, shape, strides in elements, dtype name, (device type, device id), read_only)."""

def ucx_load(candidates: Sequence[str]) -> tuple[str, str]:
    """Loads the first UCX library that can be; its path and version. Raises Unsupported."""

def ucx_transports() -> list[str]:
    """What a context of the loaded library sees here, for example "tcp/eth0"."""

def wait_ready(ready: Sequence[Readiness], timeout: float) -> None:
    """Until all are ready. Raises NotReady, NeverReady."""
