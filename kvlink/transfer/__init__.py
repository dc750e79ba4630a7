"""Moving KV between processes: endpoints, links, grants, offers (docs/transfer_contract.md)."""

from kvlink import _C
from kvlink.transfer.discovery import FileDiscovery, StoreDiscovery
from kvlink.transfer.endpoint import Endpoint
from kvlink.transfer.errors import (
    AlreadyWriting,
    ConnectError,
    DigestMismatch,
    GenerationMismatch,
    GrantExpired,
    GrantRevoked,
    InvalidDescriptor,
    LinkClosed,
    LinkRefused,
    MoveFailed,
    OutOfSlots,
    PagesLent,
    PathUnavailable,
    PeerLost,
    PeerUnreachable,
    ProtocolError,
    RowCountMismatch,
    SecretMismatch,
    StaleTransfer,
    TransferCancelled,
    TransferError,
    TransferFailed,
    TransferTimeout,
    Unconvertible,
    UnknownRegion,
    VersionMismatch,
)
from kvlink.transfer.grant import Arrival, Grant
from kvlink.transfer.group_transfer import GroupTransfer, LeaseGroup
from kvlink.transfer.groups import GrantGroup, Member, OfferGroup
from kvlink.transfer.link import Link
from kvlink.transfer.offer import Lease, Offer
from kvlink.transfer.plan import PlanSummary, PoolShape, TransferPlan
from kvlink.transfer.region import Region, RegionDescriptor
from kvlink.transfer.transfer import PartTimes, Progress, Transfer

TransferStatus = _C.TransferStatus

__all__ = [
    "AlreadyWriting",
    "Arrival",
    "ConnectError",
    "DigestMismatch",
    "Endpoint",
    "FileDiscovery",
    "GenerationMismatch",
    "Grant",
    "GrantExpired",
    "GrantGroup",
    "GrantRevoked",
    "GroupTransfer",
    "InvalidDescriptor",
    "Lease",
    "LeaseGroup",
    "Link",
    "LinkClosed",
    "LinkRefused",
    "Member",
    "MoveFailed",
    "Offer",
    "OfferGroup",
    "OutOfSlots",
    "PagesLent",
    "PartTimes",
    "PathUnavailable",
    "PeerLost",
    "PeerUnreachable",
    "PlanSummary",
    "PoolShape",
    "Progress",
    "ProtocolError",
    "Region",
    "RegionDescriptor",
    "RowCountMismatch",
    "SecretMismatch",
    "StaleTransfer",
    "StoreDiscovery",
    "Transfer",
    "TransferCancelled",
    "TransferError",
    "TransferFailed",
    "TransferPlan",
    "TransferStatus",
    "TransferTimeout",
    "Unconvertible",
    "UnknownRegion",
    "VersionMismatch",
]
