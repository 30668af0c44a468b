# SPDX-License-Identifier: Apache-2.0
"""Each process records what it sees of a run, and the files together are the run."""

import jax
import numpy as np
from conftest import PORTABLE, devices, make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _stats_file

pytestmark = PORTABLE


def test_a_process_counts_what_it_has(tmp_path):
    ranks = len(devices())
    mesh = make_mesh((ranks,))
    recorder = jax_ep.Recorder(mesh, num_experts=2 * ranks, num_layers=2)
    load = np.arange(3 * 2 * 2 * ranks, dtype=np.int32).reshape(3, 2, 2 * ranks)
    dropped = 1 + load[:, :, ::2]
    split = NamedSharding(mesh, P(None, "expert"))
    for step in range(3):
        by_rank = jax.make_array_from_callback(
            dropped.shape[1:], split, lambda part, step=step: dropped[step][part]
        )
        recorder.add(load[step], by_rank)
    mine = np.array([d.process_index == jax.process_index() for d in devices()])
    recorder.write(tmp_path / "run.npz")
    run = _stats_file.read(tmp_path / "run.npz")
    assert run.header.process == jax.process_index() and run.header.num_ranks == ranks
    np.testing.assert_array_equal(run.load, load)
    np.testing.assert_array_equal(run.dropped, np.where(mine, dropped, 0))
