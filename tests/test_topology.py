# SPDX-License-Identifier: Apache-2.0
"""Nodes times local ranks from where the ranks live."""

import pytest

from jax_ep._topology import Place, Topology, of_group


def places(hosts, processes=None):
    """Ranks on hosts named by letters, one process each unless given."""
    return [Place(p, h) for p, h in zip(processes or range(len(hosts)), hosts, strict=True)]


@pytest.mark.parametrize(
    "hosts, gpus_per_node, want",
    [
        ("a", None, (1, 1, 1)),
        ("aaaa", None, (1, 4, 1)),
        ("ab", None, (2, 1, 2)),  # 2x1
        ("aabb", None, (2, 2, 2)),  # 2x2
        ("aabbccdd", None, (4, 2, 4)),  # 4x2
        ("aaaaaaaabbbbbbbb", None, (2, 8, 2)),
        ("ba", None, (2, 1, 2)),  # the order of the mesh, not of names
        ("aaaa", 4, (1, 4, 1)),  # virtual nodes from here on
        ("aaaa", 2, (2, 2, 1)),
        ("aaaa", 1, (4, 1, 1)),
        ("aaaaaaaa", 2, (4, 2, 1)),
        ("aabb", 1, (4, 1, 2)),
        ("aaaabbbb", 2, (4, 2, 2)),
    ],
)
def test_nodes(hosts, gpus_per_node, want):
    topology = of_group(places(hosts), gpus_per_node)
    assert topology == Topology(*want)
    assert topology.spans_nodes == (want[0] > 1)


@pytest.mark.parametrize("processes", [(0, 0, 0, 0), (0, 0, 1, 1)])
def test_one_process_with_several_gpus_of_one_node(processes):
    assert of_group(places("aaaa", processes)) == Topology(1, 4, 1)


@pytest.mark.parametrize(
    "hosts, processes, gpus_per_node, expected",
    [
        ("abab", None, None, "the ranks of a host to be neighbours"),
        ("aabbaa", None, None, "the ranks of a host to be neighbours"),
        ("aab", None, None, "the same number of ranks on every host"),
        ("aaabbb", None, 2, "Config.gpus_per_node=2 to divide the 3 ranks"),
        ("aabb", None, 4, "Config.gpus_per_node=4 to divide the 2 ranks"),
        ("aaaa", None, 8, "Config.gpus_per_node=8 to divide the 4 ranks"),
        ("aabb", (0, 0, 1, 1), None, "one process for each rank"),
        ("aaaa", (0, 0, 0, 0), 2, "one process for each rank"),
    ],
)
def test_layouts_that_are_no_nodes(hosts, processes, gpus_per_node, expected):
    with pytest.raises(ValueError, match=expected):
        of_group(places(hosts, processes), gpus_per_node)


def test_the_error_shows_what_was_found():
    with pytest.raises(ValueError) as error:
        of_group([Place(3, "north"), Place(10, "north"), Place(4, "south")])
    assert str(error.value).splitlines() == [
        "mesh: expected the same number of ranks on every host, got",
        "  ranks   processes  host",
        "  0 to 1  3, 10      north",
        "  2       4          south",
    ]
