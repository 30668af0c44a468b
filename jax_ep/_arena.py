# SPDX-License-Identifier: Apache-2.0
"""Pieces of one stretch of memory, by offset."""

#: Every piece starts at a multiple of this many bytes.
ALIGNMENT = 256


class Arena:
    """Offsets of pieces: the same on every rank whose calls were the same, in the same order.

    A piece goes where the first free stretch is long enough.
    """

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self._pieces: dict[str, tuple[int, int]] = {}  # offset and bytes, by offset

    @property
    def free_bytes(self) -> int:
        """Bytes of no piece."""
        return self.num_bytes - sum(size for _, size in self._pieces.values())

    def offset(self, key: str) -> int | None:
        """Where the piece `key` is, if there is one."""
        piece = self._pieces.get(key)
        return None if piece is None else piece[0]

    def take(self, key: str, num_bytes: int) -> int:
        """Offset of a new piece `key` of at least `num_bytes`.

        Raises:
            ValueError: there is a piece `key`.
            MemoryError: no free stretch is long enough.
        """
        if key in self._pieces:
            raise ValueError(f"arena: expected a new piece, got {key!r} again")
        size = -(-max(num_bytes, 1) // ALIGNMENT) * ALIGNMENT
        at = 0
        for offset, taken in self._pieces.values():
            if offset - at >= size:
                break
            at = offset + taken
        if at + size > self.num_bytes:
            raise MemoryError(
                f"arena: expected a free stretch of {size} bytes for {key!r}, got {self.free_bytes} "
                f"free of {self.num_bytes} in all: raise Rdma.arena_bytes"
            )
        self._pieces[key] = at, size
        self._pieces = dict(sorted(self._pieces.items(), key=lambda piece: piece[1]))
        return at

    def give_back(self, key: str) -> None:
        """Free the piece `key`."""
        del self._pieces[key]
