# SPDX-License-Identifier: Apache-2.0
"""Expert-parallel communication for JAX: `dispatch` tokens to their experts, `combine` results.

::

    d = jax_ep.dispatch(x, topk_idx, topk_weights, num_experts=64)     # inside jax.shard_map
    h = jax.lax.ragged_dot(d.tokens, w_in, d.group_sizes)
    y = jax.lax.ragged_dot(jax.nn.silu(h), w_out, d.group_sizes)
    out = jax_ep.combine(y, d.handle, weights=d.weights)
"""

__version__ = "0.1.0"  # first: _ffi compares it with the compiled parts

from . import balance, reference, routing
from ._api import combine, dispatch
from ._group import check, finalize, initialize
from ._in_flight import combine_done, combine_start, dispatch_done, dispatch_start
from ._layout import num_rows
from ._stats import Timings, stats
from ._stats_recorder import Recorder
from ._types import REMAT_NAMES, Config, Dispatched, Handle, InFlight, Rdma

__all__ = [
    "REMAT_NAMES",
    "Config",
    "Dispatched",
    "Handle",
    "InFlight",
    "Rdma",
    "Recorder",
    "Timings",
    "balance",
    "check",
    "combine",
    "combine_done",
    "combine_start",
    "dispatch",
    "dispatch_done",
    "dispatch_start",
    "finalize",
    "initialize",
    "num_rows",
    "reference",
    "routing",
    "stats",
]
