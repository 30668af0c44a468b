# SPDX-License-Identifier: Apache-2.0
"""The example of docs/multi_node.md in one process; several run it the same way."""

import jax_ep
from jax_ep.examples import multi_node

SMALL = ["--tokens=8", "--hidden=32", "--experts-per-rank=1", "--top-k=2"]


def test_it_learns(capsys):
    jax_ep.finalize()  # the groups of other tests have room for small batches
    assert multi_node.main([*SMALL, "--steps=12"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("8 ranks in 1 processes, cpu\n") and "ms a step" in said
