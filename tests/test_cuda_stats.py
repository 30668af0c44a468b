# SPDX-License-Identifier: Apache-2.0
"""Timings that the CUDA kernels record: which operations, which phases, who is awaited."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DIRECT
from conftest import TIMEOUT_S, make_mesh
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _report_numbers

pytestmark = [pytest.mark.gpu, pytest.mark.multi]
T, H, K, E = 64, 512, 4, 16


@pytest.fixture
def mesh():
    if len(jax.devices()) < 2 or jax.default_backend() != "gpu":
        pytest.fail(f"expected 2 GPUs, got {jax.devices()}")
    jax_ep.finalize()
    mesh = make_mesh((2,))
    jax_ep.initialize(mesh, timeout_s=TIMEOUT_S, stats=True)
    yield mesh
    jax_ep.check()
    jax_ep.finalize()


def exchange(mesh, config, *, late=0, steps=1):
    """A jitted function of (x, idx): dispatch and combine, `steps` times, rank 1 `late` by as much."""

    def delay(x, idx):  # both: the plan needs but idx
        turns = jnp.where(lax.axis_index("expert") == 1, late, 0)
        busy = lambda _, m: jnp.tanh(m @ m)
        m = lax.pcast(jnp.eye(256), "expert", to="varying")
        zero = 0 * lax.fori_loop(0, turns, busy, m)[0, 0]
        return x + zero, idx + zero.astype(idx.dtype)

    def step(_, x, idx):
        x, idx = delay(x, idx) if late else (x, idx)
        d = jax_ep.dispatch(x, idx, num_experts=E, config=config)
        return jax_ep.combine(d.tokens, d.handle)

    def on_rank(x, idx):
        return lax.fori_loop(0, steps, lambda i, x: step(i, x, idx), x)

    split = P("expert")
    return jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=split, out_specs=split))


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * T, H), np.float32)
    return x, rng.integers(0, E, (2 * T, K)).astype(np.int32)


def of_device(timings, device):
    return timings[timings.device == device.id]


def new_timings(before):
    """Those after `before`, a number for each device."""
    timings = jax_ep.stats()
    last = np.array([before[device] for device in timings.device])
    return timings[timings.number > last]


def last_numbers(mesh):
    every = jax_ep.stats()
    return {d.id: int(of_device(every, d).number.max(initial=0)) for d in mesh.devices.flat}


@pytest.mark.parametrize("steps", [1, 40])  # launched, or a loop's CUDA graph
@pytest.mark.parametrize(
    "config, names", [(DIRECT, ["plan", "dispatch", "combine"]), (None, ["dispatch", "combine"])]
)
def test_every_operation_is_recorded_once(mesh, arrays, config, names, steps):
    f = exchange(mesh, config, steps=steps)
    jax.block_until_ready(f(*arrays))  # compiles
    before = last_numbers(mesh)
    for _ in range(5):
        jax.block_until_ready(f(*arrays))
    timings = new_timings(before)
    for rank, device in enumerate(mesh.devices.flat):
        mine = of_device(timings, device)
        assert mine.names.tolist() == 5 * steps * names
        assert (np.diff(mine.number) == 1).all() and (np.diff(mine.begin_ns) > 0).all()
        assert (mine.rank == rank).all() and (mine.num_ranks == 2).all()
        assert ((mine.total_ns > 1000) & (mine.total_ns < 1e8)).all(), mine.total_ns
        phases = mine.wait_ns + mine.push_ns + mine.work_ns
        np.testing.assert_array_equal(phases, mine.total_ns)
        assert (mine.waits_ns[:, rank] == 0).all()
        assert (mine.waits_ns.max(1) <= mine.total_ns + 2000).all()  # blocks begin one by one
        pushes = mine.names != "plan"
        assert (mine.push_ns[pushes] > 0).all()


@pytest.mark.parametrize("config", [DIRECT, None])
def test_a_late_rank_is_named(mesh, arrays, config):
    f = exchange(mesh, config, late=60)
    jax.block_until_ready(f(*arrays))
    recorder = jax_ep.Recorder(mesh, num_experts=E)
    for _ in range(20):
        jax.block_until_ready(f(*arrays))
        recorder.add(np.ones(E, int))
    run = recorder.run()
    summary = _report_numbers.summarise(run)
    dispatch = next(o for o in summary.operations if o.name == "dispatch")
    print({o.name: o.waits_us.round(1).tolist() for o in summary.operations})
    first = summary.operations[0]  # after the delay
    assert first.waits_us[0, 1] > 50 > first.waits_us[1, 0]
    assert dispatch.count == 40 and run.lost.sum() == 0
    assert summary.slow is not None and summary.slow.device == 1


def test_it_is_off_when_it_is_off(mesh, arrays):
    def run(times, stats):  # a new program, as a captured graph stays as it is
        jax_ep.initialize(mesh, timeout_s=TIMEOUT_S, stats=stats)
        f = exchange(mesh, None)
        for _ in range(times):
            jax.block_until_ready(f(*arrays))

    run(1, True)
    before = last_numbers(mesh)
    run(3, False)
    assert len(new_timings(before)) == 0
    run(1, True)
    timings = new_timings(before)
    assert len(timings) == 4  # dispatch and combine on two devices
    assert {int(n) for n in timings.number} == {before[mesh.devices.flat[0].id] + n for n in (7, 8)}


def test_halves(mesh, arrays):
    def halves(x, idx):
        d = jax_ep.dispatch_done(jax_ep.dispatch_start(x, idx, num_experts=E))
        return jax_ep.combine_done(jax_ep.combine_start(d.tokens, d.handle))

    split = P("expert")
    f = jax.jit(jax.shard_map(halves, mesh=mesh, in_specs=split, out_specs=split))
    jax.block_until_ready(f(*arrays))
    names = ["dispatch_start", "dispatch_done", "combine_start", "combine_done"]
    for device in mesh.devices.flat:
        mine = of_device(jax_ep.stats(), device)
        assert mine.names.tolist() == names
        assert (mine.push_ns[[0, 2]] > 0).all() and (mine.push_ns[[1, 3]] == 0).all()
        assert (mine.wait_ns[[0, 2]] == 0).all()
