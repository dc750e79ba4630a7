"""Two ways for peers to find each other by name: a folder that they share, and a torch store.

Addresses are bytes, so any other way does as well; these are ready-made. An entry proves nothing:
who answers at an address still has to prove the secret, and a stale entry leads to nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlink._arguments import name_text, text, wrong
from kvlink.errors import InvalidArgument
from kvlink.transfer.errors import PeerUnreachable

if TYPE_CHECKING:
    from kvlink.transfer.endpoint import Endpoint

_MAX_ADDRESS = 4096  # bytes
_MAX_STEM = 160  # characters of a file's name


class FileDiscovery:
    """One file for each name, in `folder` (made if need be), replaced in one step.

    Its readers see the old address or the new one, never a part. Works between processes, and
    between hosts that mount the same folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise wrong("folder", "a path", folder)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def publish(self, endpoint: Endpoint) -> None:
        """Tells everybody where the endpoint of that name is now. Raises OSError."""
        _endpoint(endpoint)
        fd, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new-")  # readable by the owner
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(endpoint.address)
            os.replace(temporary, self._file(endpoint.name))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def withdraw(self, endpoint: Endpoint) -> None:
        """Takes the endpoint's entry away, unless another has replaced it. Raises OSError."""
        file = self._file(_endpoint(endpoint).name)
        with contextlib.suppress(FileNotFoundError):
            if file.read_bytes() == endpoint.address:
                file.unlink()

    def resolver(self, name: str) -> Callable[[], bytes]:
        """For `Endpoint.connect`: gives the address published under `name` at the time of the call;
        raises PeerUnreachable while there is none."""
        file = self._file(name)

        def resolve() -> bytes:
            try:
                with file.open("rb") as opened:
                    return opened.read(_MAX_ADDRESS)
            except FileNotFoundError:
                raise PeerUnreachable(f"nobody has published {name!r} in {self.folder}") from None

        return resolve

    def _file(self, name: str) -> Path:
        """Names may hold anything; files' names may not."""
        stem = urllib.parse.quote(_checked(name), safe="")
        if len(stem) > _MAX_STEM:
            stem = f"{stem[:_MAX_STEM]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return self.folder / f"{stem}.kvlink"


class StoreDiscovery:
    """Keys of a `torch.distributed` store (TCPStore, FileStore, ...) that all peers reach.

    `prefix` keeps these keys apart from others. Torch is not imported here.
    """

    def __init__(self, store: Any, prefix: str = "kvlink/") -> None:
        for method in ("set", "get", "check"):
            if not callable(getattr(store, method, None)):
                raise InvalidArgument(f"store: expected a torch.distributed store; got {store!r}")
        text("prefix", prefix)
        self._store = store
        self._prefix = prefix

    def publish(self, endpoint: Endpoint) -> None:
        """Tells everybody where the endpoint of that name is now. Raises what the store raises."""
        self._store.set(self._prefix + _endpoint(endpoint).name, endpoint.address.decode())

    def withdraw(self, endpoint: Endpoint) -> None:
        """Takes the endpoint's entry away, unless another has replaced it."""
        key = self._prefix + _endpoint(endpoint).name
        if self._store.check([key]) and bytes(self._store.get(key)) == endpoint.address:
            self._store.delete_key(key)

    def resolver(self, name: str) -> Callable[[], bytes]:
        """As `FileDiscovery.resolver`. Never waits for a key that is not there."""
        key = self._prefix + _checked(name)

        def resolve() -> bytes:
            if not self._store.check([key]):
                raise PeerUnreachable(f"nobody has published {name!r} in the store")
            return bytes(self._store.get(key))

        return resolve


def _checked(name: str) -> str:
    return name_text("name", name)


def _endpoint(endpoint: Any) -> Endpoint:
    from kvlink.transfer.endpoint import Endpoint

    if not isinstance(endpoint, Endpoint):
        raise wrong("endpoint", "an Endpoint", endpoint)
    return endpoint
