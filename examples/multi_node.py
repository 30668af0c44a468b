# SPDX-License-Identifier: Apache-2.0
"""A MoE layer over several processes and hosts, trained for a few steps and checked.

    srun --ntasks-per-node=8 python -m jax_ep.examples.multi_node     # Slurm tells JAX who is who
    JAX_COORDINATOR_ADDRESS=node0:1234 JAX_NUM_PROCESSES=16 JAX_PROCESS_ID=0 python -m ...

One process for each GPU, all of which run the same. Without Slurm the three variables tell JAX its
place, the last of them another one in each process. docs/multi_node.md shows both.

Every process makes its own tokens, and all of them together are one group of experts. First, tokens
that come back from dispatch and combine with experts that do nothing must be themselves. Then the
layer learns to double its tokens; the exit status is 1 unless the loss falls.
"""

import argparse
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep


def main(argv: list[str] | None = None) -> int:
    """Run it as this process's part; returns the exit status."""
    parser = argparse.ArgumentParser(description="Train a MoE layer on several hosts.")
    for name, default, what in (
        ("tokens", 1024, "of each rank"),
        ("hidden", 1024, "channels"),
        ("experts-per-rank", 4, "experts of each rank"),
        ("top-k", 4, "experts of each token"),
        ("steps", 20, "of training"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument(
        "--gpus-per-node", type=int, help="split hosts into virtual nodes of so many (none)"
    )
    parser.add_argument("--implementation", choices=["cuda", "xla"], help="(cuda on GPUs)")
    args = parser.parse_args(argv)
    connect()
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))
    config = jax_ep.Config(gpus_per_node=args.gpus_per_node)
    if args.implementation != "xla":
        jax_ep.initialize(mesh, config=config)
    say(f"{len(devices)} ranks in {jax.process_count()} processes, {devices[0].device_kind}")

    num_experts = args.experts_per_rank * len(devices)
    options = dict(num_experts=num_experts, implementation=args.implementation, config=config)
    split, whole = NamedSharding(mesh, P("expert")), NamedSharding(mesh, P())

    def normal(shape, seed, sharding):
        """The same array in all processes, each of which makes all of it and keeps its part."""
        values = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return jax.make_array_from_callback(shape, sharding, lambda part: values[part])

    x = normal((args.tokens * len(devices), args.hidden), 0, split)
    router = normal((args.hidden, num_experts), 1, whole) / args.hidden**0.5
    w = normal((num_experts, args.hidden, args.hidden), 2, split) / args.hidden**0.5

    def route(x, router):
        return jax_ep.routing.top_k(x @ router, args.top_k)

    def echo(x, router):
        weights, idx = route(x, router)
        d = jax_ep.dispatch(x, idx, weights, **options)
        back = jax_ep.combine(d.tokens, d.handle, weights=d.weights)
        return jnp.max(jnp.abs(back - x), keepdims=True).reshape(1)

    def loss(w, x, router):
        weights, idx = route(x, router)
        d = jax_ep.dispatch(x, idx, weights, **options)
        y = jax.lax.ragged_dot(d.tokens, w, d.group_sizes)
        out = jax_ep.combine(y, d.handle, weights=d.weights)
        return jnp.mean((out - 2 * x) ** 2).reshape(1)

    echoes = jax.shard_map(echo, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P("expert"))
    errors = jax.jit(echoes, out_shardings=split)(x, router)
    worst = float(jax.jit(jnp.max, out_shardings=whole)(errors))
    say(f"tokens come back within {worst:.1e}")

    @jax.jit
    def step(w, x, router):
        losses = jax.shard_map(
            loss, mesh=mesh, in_specs=(P("expert"), P("expert"), P()), out_specs=P("expert")
        )
        mean, gradient = jax.value_and_grad(lambda w: jnp.mean(losses(w, x, router)))(w)
        return w - args.hidden * num_experts * 0.02 * gradient, mean

    history, began = [], 0.0
    for number in range(args.steps):
        w, mean = step(w, x, router)
        history.append(float(mean))
        began = began or time.perf_counter()  # once the first, which compiles, is done
        if number in (0, args.steps - 1):
            say(f"step {number + 1}: loss {history[-1]:.4f}")
    seconds = (time.perf_counter() - began) / max(1, args.steps - 1)
    say(f"{1e3 * seconds:.2f} ms a step")
    return int(not (worst < 1e-4 and history[-1] < 0.9 * history[0]))


def connect() -> None:
    """Find the other processes, if this one was told of any, before anything touches a device."""
    if jax.distributed.is_initialized():
        return
    count = os.environ.get("JAX_NUM_PROCESSES")
    if count is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            num_processes=int(count), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    elif "SLURM_PROCID" in os.environ:  # under srun
        jax.distributed.initialize()


def say(text: str) -> None:
    """Print it once, not once for each process."""
    if jax.process_index() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
