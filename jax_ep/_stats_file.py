# SPDX-License-Identifier: Apache-2.0
"""The statistics of one run as data, and as a file: versioned, written whole or not at all."""

import dataclasses
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ._stats import OPERATIONS

VERSION = 1  # of the format, OPERATIONS, PHASES and buckets included
PHASES = ("wait", "push", "work", "total")
BUCKETS_PER_OCTAVE, BUCKETS = 16, 512  # of durations: from 1 ns to 4 s
_ARRAYS = ("load", "dropped", "durations", "waits", "longest", "lost")


@dataclasses.dataclass(frozen=True)
class Header:
    """Whose statistics: what must agree between the files of one run, then what need not."""

    run: str  # the name
    num_layers: int
    num_experts: int
    num_ranks: int  # of a group
    num_groups: int
    process: int = 0
    devices: str = ""
    started: str = ""  # ISO 8601
    jax_ep: str = ""
    steps: int = 0
    window: int = 1  # steps that each row of `load` and `dropped` sums

    @property
    def model(self) -> dict:
        """What files of one run agree in."""
        names = ("run", "num_layers", "num_experts", "num_ranks", "num_groups")
        return {name: getattr(self, name) for name in names}

    @property
    def num_devices(self) -> int:
        """Ranks of all groups, group-major."""
        return self.num_groups * self.num_ranks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of `Run`."""
        windows, n, kinds = -(-self.steps // self.window), self.num_devices, len(OPERATIONS)
        return {
            "load": (windows, self.num_layers, self.num_experts),
            "dropped": (windows, self.num_layers, n),
            "durations": (kinds, len(PHASES), n, BUCKETS),
            "waits": (kinds, n, self.num_ranks),
            "longest": (kinds, n, self.num_ranks),
            "lost": (n,),
        }


@dataclasses.dataclass(frozen=True)
class Run:
    """Statistics of one run, or of the part of it that one process saw.

    Attributes:
        header: whose.
        load: [windows, layers, E] pairs of each expert.
        dropped: [windows, layers, N] pairs dropped on each of N devices.
        durations: [operations, phases, N, buckets] how many operations took how long (`bucket`).
        waits: [operations, N, R] ns that device n waited for rank r of its group, summed.
        longest: [operations, N, R] ns, the longest of them.
        lost: [N] operations that the device had overwritten before they were read.
    """

    header: Header
    load: np.ndarray
    dropped: np.ndarray
    durations: np.ndarray
    waits: np.ndarray
    longest: np.ndarray
    lost: np.ndarray


def bucket(ns: np.ndarray) -> np.ndarray:
    """The bucket of `Run.durations` for durations in ns, 16 to an octave: within 2.2 %."""
    exact = BUCKETS_PER_OCTAVE * np.log2(np.maximum(ns, 1))
    return np.minimum(exact.astype(np.int64), BUCKETS - 1)


def quantile_ns(counts: np.ndarray, q: float) -> np.ndarray:
    """Quantile `q` of durations counted in buckets, `[..., buckets]` to `[...]`; NaN of none."""
    total = counts.sum(-1)
    at = (np.cumsum(counts, -1) >= np.maximum(q * total, 1)[..., None]).argmax(-1)
    return np.where(total > 0, 2 ** ((at + 0.5) / BUCKETS_PER_OCTAVE), np.nan)


def write(path: str | os.PathLike, run: Run, *, replace: bool = False) -> None:
    """Write a run to a file, which then is either the old one or the new one, whole.

    Args:
        path: where; by convention `.npz`, as NumPy can read it.
        run: what.
        replace: also replace a file that is not an earlier state of this run.

    Raises:
        FileExistsError: there is a file of something else.
    """
    path = Path(path)
    if path.exists() and not replace and not _is_earlier_state(path, run):
        raise FileExistsError(
            f"{path}: expected no file, or an earlier state of this run, got another one. Move it "
            "away, or write with replace=True."
        )
    header = json.dumps({"version": VERSION, **dataclasses.asdict(run.header)})
    arrays = {name: getattr(run, name) for name in _ARRAYS}
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez_compressed(file, header=np.array(header), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str | os.PathLike) -> Run:
    """The run in a file that `write` wrote.

    Raises:
        ValueError: it is not such a file, is truncated, or of another version; with expected and
            got.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            fields = json.loads(str(file["header"]))
            version = fields.pop("version")
            if version != VERSION:
                raise ValueError(
                    f"{path}: expected statistics of version {VERSION}, got version {version!r}"
                )
            run = Run(Header(**fields), **{name: file[name] for name in _ARRAYS})
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, AttributeError) as error:
        raise _not_statistics(path, error) from error
    except ValueError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise _not_statistics(path, error) from error
    for name, shape in run.header.shapes().items():
        got = getattr(run, name).shape
        if got != shape:
            raise ValueError(f"{path}: expected {name} of shape {shape}, got {got}")
    return run


def merge(runs: list[Run], names: list[str]) -> Run:
    """The parts that processes saw of one run, as one; `names` are of the files, for errors.

    Raises:
        ValueError: parts of different models, or the same part twice.
    """
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        for key, expected in first.header.model.items():
            got = run.header.model[key]
            if got != expected:
                raise ValueError(
                    f"{name}: expected statistics of the same model and run as {names[0]}, with "
                    f"{key}={expected!r}, got {key}={got!r}"
                )
    processes = [run.header.process for run in runs]
    for name, process in zip(names, processes, strict=True):
        if processes.count(process) > 1:
            raise ValueError(
                f"{name}: expected one file of each process, got several of process {process}"
            )
    steps = min(run.header.steps for run in runs)
    window = max(run.header.window for run in runs)
    header = dataclasses.replace(first.header, steps=steps, window=window)
    load, dropped = (
        # What a process does not see is zero; what several see is the same.
        np.max([_widened(run, getattr(run, name), header) for run in runs], 0)
        for name in ("load", "dropped")
    )
    sums = {
        name: np.sum([getattr(run, name) for run in runs], 0)
        for name in ("durations", "waits", "lost")
    }
    longest = np.max([run.longest for run in runs], 0)
    return Run(header, load=load, dropped=dropped, longest=longest, **sums)


def _widened(run: Run, windows: np.ndarray, header: Header) -> np.ndarray:
    """Rows of a run in the windows of another header, which are a multiple of its own."""
    starts = np.arange(0, len(windows), header.window // run.header.window)
    wide = np.add.reduceat(windows, starts, axis=0) if len(windows) else windows
    return wide[: -(-header.steps // header.window)]


def _is_earlier_state(path: Path, run: Run) -> bool:
    try:
        there = read(path).header
    except ValueError:
        return False
    here = run.header
    same = (there.model, there.started, there.process) == (here.model, here.started, here.process)
    return same and there.steps <= here.steps


def _not_statistics(path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: expected a statistics file of jax_ep, got one that is truncated or something "
        f"else ({type(error).__name__}: {error})"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
