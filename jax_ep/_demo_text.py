# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine has: the sources of Python's own standard library, as bytes."""

import dataclasses
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Text:
    """Training and held-out bytes; no file is in both."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    num_files: int

    @property
    def unigram_entropy(self) -> float:
        """Nats per byte of the best model that sees no context: `-sum(p * log(p))`."""
        counts = np.bincount(self.train, minlength=256) + np.bincount(self.held_out, minlength=256)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())


def standard_library() -> Text:
    """Every `.py` file of this interpreter's library, in the order of its path.

    A file is held out by a checksum of its path (one in 16), so adding files moves no other.

    Raises:
        FileNotFoundError: fewer than two files (a stripped or zipped library).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    paths = [p for p in paths if not skipped.intersection(p.split("/"))]
    split: dict[bool, list[bytes]] = {False: [], True: []}
    for path in paths:
        split[zlib.crc32(path.encode()) % 16 == 0].append((root / path).read_bytes())
    if not split[True] or not split[False]:
        raise FileNotFoundError(f"expected the standard library's sources, found none in {root}")
    train, held_out = (np.frombuffer(b"".join(split[key]), np.uint8) for key in (False, True))
    return Text(train, held_out, len(paths))


def windows(text: NDArray[np.uint8], starts: NDArray[np.integer], length: int) -> NDArray[np.int32]:
    """Stretches of `length` bytes from each start, `[len(starts), length]`."""
    return text[starts[:, None] + np.arange(length)].astype(np.int32)
