# SPDX-License-Identifier: Apache-2.0
"""A MoE layer with a skewed router trains, is rebalanced while it trains, and trains on.

    python -m jax_ep.examples.rebalance      # all GPUs, or 8 host devices

Loads are counted in every step. After half of the steps `balance.solve` makes a placement of them on
the host, one jitted call moves weights and momentum, and training goes on where it was. A buffer must
have room for the busiest rank, or pairs drop: so the capacity of both halves is what their imbalance
asks for, and the second half has fewer rows to compute. Printed are imbalance, capacity, step time
and loss of both, and the exit status is 1 if a pair was dropped or the loss rose.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _demo, balance
from jax_ep.balance import Placement

from . import experts

SLACK = 1.15  # rows of a rank over what the measured load asks for


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the layer, and of the training."""

    tokens: int = 512  # on each rank
    hidden: int = 64
    expert_hidden: int = 64
    num_experts: int = 32
    num_slots: int = 40
    top_k: int = 2
    skew: float = 0.15
    steps: int = 12  # in each half
    rate: float = 0.5

    def layer(self, capacity_factor: float | None) -> experts.MoEConfig:
        """The layer as dispatch sees it: its experts are slots."""
        return experts.MoEConfig(
            self.hidden,
            self.expert_hidden,
            num_experts=self.num_slots,
            top_k=self.top_k,
            capacity_factor=capacity_factor,
        )

    @property
    def preference(self) -> Array:
        """`[E]`, added to scores for selection: what skews the router."""
        return -self.skew * jnp.log(jnp.arange(1, self.num_experts + 1, dtype=jnp.float32))


def make_state(sizes: Sizes, placement: Placement, mesh: Mesh) -> dict:
    """Parameters and momentum; weights of experts by slot, `[P, ...]`, split over the ranks."""
    h, f = sizes.hidden, sizes.expert_hidden
    keys = jax.random.split(jax.random.key(0), 3)
    w_in = jax.random.normal(keys[0], (sizes.num_experts, h, 2 * f)) / h**0.5
    w_out = jax.random.normal(keys[1], (sizes.num_experts, f, h)) / f**0.5
    by_slot = {"w_in": w_in[placement.experts], "w_out": w_out[placement.experts]}
    by_slot = jax.device_put(by_slot, NamedSharding(mesh, P("expert")))
    router = jax.random.normal(keys[2], (h, sizes.num_experts)) / h**0.5
    router = jax.device_put(router, NamedSharding(mesh, P()))
    params = {"router": router, "experts": by_slot}
    return {"params": params, "momentum": jax.tree.map(jnp.zeros_like, params)}


def batch(sizes: Sizes, mesh: Mesh, step: int) -> tuple[Array, Array]:
    """Tokens and what the layer shall make of them, `[R*T, H]` each."""
    rng = np.random.default_rng(step)
    x = rng.standard_normal((mesh.size * sizes.tokens, sizes.hidden), np.float32)
    teacher = np.random.default_rng(0).standard_normal((sizes.hidden, sizes.hidden), np.float32)
    return jax.device_put((x, np.tanh(x @ teacher / 8)), NamedSharding(mesh, P("expert")))


def layer(sizes: Sizes, capacity_factor, params: dict, placement: Placement, x: Array):
    """`x [T, H]` to `(out [T, H], load [E], dropped)` on one rank; load and drops of the group."""
    config = sizes.layer(capacity_factor)
    weights, idx = experts.route(config, x, params["router"], sizes.preference)
    slots = jax_ep.routing.place(idx, placement, "expert")
    d = experts.dispatch(config, x, slots, weights)
    out = experts.combine(experts.experts(d, **params["experts"]), d)
    load = jax_ep.routing.expert_load(idx, sizes.num_experts, "expert")
    return out, load, lax.psum(d.num_dropped[0], "expert")


def state_specs() -> dict:
    """How `make_state` is split over the ranks."""
    params = {"router": P(), "experts": {"w_in": P("expert"), "w_out": P("expert")}}
    return {"params": params, "momentum": params}


def make_step(sizes: Sizes, mesh: Mesh, capacity_factor: float | None):
    """Jitted `(state, placement, x, target)` to `(state, loss, load, dropped)`."""

    def on_rank(state, placement, x, target):
        def loss(params):
            out, load, dropped = layer(sizes, capacity_factor, params, placement, x)
            return jnp.square(out - target).mean() / mesh.size, (load, dropped)

        (part, counts), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        grads["experts"] = balance.sum_replica_gradients(grads["experts"], placement)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
        params = jax.tree.map(lambda p, m: p - sizes.rate * m, state["params"], momentum)
        return {"params": params, "momentum": momentum}, lax.psum(part, "expert"), *counts

    split = P("expert")
    return jax.jit(
        jax.shard_map(
            on_rank,
            mesh=mesh,
            in_specs=(state_specs(), P(), split, split),
            out_specs=(state_specs(), P(), P(), P()),
        ),
        donate_argnums=0,
    )


@functools.cache
def make_move(mesh: Mesh):
    """Jitted `(experts' weights, old placement, new placement)` to weights in their new slots."""
    return jax.jit(
        jax.shard_map(
            balance.move, mesh=mesh, in_specs=(P("expert"), P(), P()), out_specs=P("expert")
        )
    )


def rebalance(state: dict, old: Placement, new: Placement, mesh: Mesh) -> dict:
    """The state with every expert's weights and momentum in its new slots."""
    by_slot = {name: tree["experts"] for name, tree in state.items()}
    moved = make_move(mesh)(by_slot, old, new)
    return {name: {**tree, "experts": moved[name]} for name, tree in state.items()}


def measure_load(sizes: Sizes, mesh: Mesh, state: dict) -> np.ndarray:
    """Pairs of each expert in the first batch, `[E]`, before anything was dispatched."""
    config = sizes.layer(None)

    @jax.jit
    def load(x, router):
        _, idx = experts.route(config, x, router, sizes.preference)
        return jax_ep.routing.expert_load(idx, sizes.num_experts)

    return np.asarray(load(batch(sizes, mesh, 0)[0], state["params"]["router"]))


@dataclasses.dataclass
class Half:
    """What was measured in half of the steps."""

    imbalance: float
    capacity_factor: float
    step_ms: float
    losses: list[float]
    load: np.ndarray
    dropped: int


def train(
    sizes: Sizes, mesh: Mesh, state: dict, placement: Placement, expected: np.ndarray, first: int
) -> tuple[dict, Half]:
    """`sizes.steps` steps from number `first` on, with room for a load like the expected one."""
    factor = SLACK * float(balance.imbalance(expected, placement))
    step = make_step(sizes, mesh, factor)
    losses, seconds, load, drops = [], [], np.zeros(sizes.num_experts), 0
    for number in range(first, first + sizes.steps):
        data = jax.block_until_ready(batch(sizes, mesh, number))
        start = time.perf_counter()
        state, loss, counted, dropped = jax.block_until_ready(step(state, placement, *data))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        load, drops = load + np.asarray(counted), drops + int(dropped)
    measured = float(balance.imbalance(load, placement))
    step_ms = statistics.median(seconds[1:]) * 1e3  # the first compiles
    return state, Half(measured, factor, step_ms, losses, load, drops)


def run(sizes: Sizes, mesh: Mesh) -> tuple[Half, Half]:
    """Both halves."""
    old = balance.round_robin(sizes.num_experts, num_slots=sizes.num_slots, num_ranks=mesh.size)
    state = make_state(sizes, old, mesh)
    expected = measure_load(sizes, mesh, state)
    state, before = train(sizes, mesh, state, old, expected, 0)
    new = balance.solve(before.load, num_slots=sizes.num_slots, num_ranks=mesh.size)
    state = rebalance(state, old, new, mesh)
    _, after = train(sizes, mesh, state, new, before.load, sizes.steps)
    return before, after


def main(argv: list[str] | None = None) -> int:
    """Train and print; returns the exit status."""
    _demo.use_host_devices(os.environ)
    parser = argparse.ArgumentParser(prog="python -m jax_ep.examples.rebalance")
    for field in dataclasses.fields(Sizes):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    sizes = Sizes(**vars(parser.parse_args(argv)))
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    jax_ep.initialize(mesh)
    print(f"{mesh.size} ranks on {jax.devices()[0].device_kind}, {sizes}")
    before, after = run(sizes, mesh)
    for name, half in (("before", before), ("after", after)):
        print(
            f"{name:7} busiest rank {half.imbalance:.2f} of the mean, capacity "
            f"{half.capacity_factor:.2f}, {half.step_ms:.1f} ms a step, loss "
            f"{half.losses[0]:.4f} to {half.losses[-1]:.4f}, {half.dropped} pairs dropped"
        )
    jax_ep.check()
    rose = after.losses[-1] > before.losses[0]
    return int(rose or before.dropped + after.dropped > 0)


if __name__ == "__main__":
    sys.exit(main())
