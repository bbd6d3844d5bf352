"""The interface of google-crc32c over Debian's python3-crc32c, which is as fast: both are C."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import crc32c

implementation = "c"


def extend(crc: int, chunk: bytes) -> int:
    """Return the checksum of what had the checksum crc, followed by a chunk."""
    return crc32c.crc32c(chunk, crc)


def value(chunk: bytes) -> int:
    """Return the checksum of a chunk."""
    return extend(0, chunk)


class Checksum:
    """A checksum that grows, like those of hashlib."""

    __slots__ = ("_crc",)

    def __init__(self, initial_value: bytes = b"") -> None:
        self._crc = value(initial_value)

    def update(self, chunk: bytes) -> None:
        """Add a chunk."""
        self._crc = extend(self._crc, chunk)

    def digest(self) -> bytes:
        """Return four bytes, the highest first."""
        return self._crc.to_bytes(4, "big")

    def hexdigest(self) -> bytes:
        """Return the digest in hexadecimal, as bytes: so does Google's."""
        return self.digest().hex().encode()

    def copy(self) -> Checksum:
        """Return another that goes on from here."""
        other = Checksum()
        other._crc = self._crc
        return other

    def consume(self, stream: BinaryIO, chunksize: int) -> Iterator[bytes]:
        """Yield a stream's chunks, and add them."""
        while chunk := stream.read(chunksize):
            self.update(chunk)
            yield chunk
