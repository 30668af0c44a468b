# SPDX-License-Identifier: Apache-2.0
"""Which ranks of a group share a node: nodes times local ranks, in the order of the mesh."""

import dataclasses
import itertools
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank lives."""

    process: int
    host: str  # the same text in all processes of a host, and in no other


@dataclasses.dataclass(frozen=True)
class Topology:
    """A group of N nodes times L ranks: rank `n * L + l` is the l-th of node n."""

    num_nodes: int
    ranks_per_node: int
    num_hosts: int  # fewer than the nodes where these are virtual

    @property
    def spans_nodes(self) -> bool:
        """Whether data goes between nodes."""
        return self.num_nodes > 1


def of_group(places: Sequence[Place], gpus_per_node: int | None = None) -> Topology:
    """The nodes of a group whose ranks are at `places`.

    Args:
        places: one for each rank, in rank order.
        gpus_per_node: ranks that form a node, as in `Config`; None: those of a host.

    Raises:
        ValueError: a host's ranks are not neighbours, hosts have different numbers of them, these
            are no multiple of `gpus_per_node`, or a process has several ranks of a group that spans
            nodes.
    """
    runs = [(host, len(list(run))) for host, run in itertools.groupby(p.host for p in places)]
    counts = {count for _, count in runs}
    num_hosts = len({host for host, _ in runs})
    if len(runs) > num_hosts:
        raise ValueError(_say("the ranks of a host to be neighbours in the group", places))
    if len(counts) > 1:
        raise ValueError(_say("the same number of ranks on every host", places))
    (per_host,) = counts
    per_node = gpus_per_node or per_host
    if per_host % per_node:
        raise ValueError(
            _say(
                f"Config.gpus_per_node={per_node} to divide the {per_host} ranks of a host", places
            )
        )
    topology = Topology(len(places) // per_node, per_node, num_hosts)
    if topology.spans_nodes and len({p.process for p in places}) < len(places):
        raise ValueError(_say("one process for each rank of a group that spans nodes", places))
    return topology


def table(places: Sequence[Place]) -> str:
    """The places as text: one line for each run of neighbouring ranks on one host."""
    lines, first = [("ranks", "processes", "host")], 0
    for host, run in itertools.groupby(places, lambda p: p.host):
        processes = [p.process for p in run]
        last = first + len(processes) - 1
        ranks = f"{first}" if first == last else f"{first} to {last}"
        lines.append((ranks, ", ".join(map(str, dict.fromkeys(processes))), host))
        first = last + 1
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return "\n".join(f"  {r:<{widths[0]}}  {p:<{widths[1]}}  {h}" for r, p, h in lines)


def _say(expected: str, places: Sequence[Place]) -> str:
    return f"mesh: expected {expected}, got\n{table(places)}"
