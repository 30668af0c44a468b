# SPDX-License-Identifier: Apache-2.0
"""How nodes_program.py runs checks in step with the other processes."""

import dataclasses
import os
import sys
import time
import traceback
from typing import Any

import jax
import numpy as np
from cases import assert_matches, flat, program, put, reference
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep import _ffi, _rendezvous

# XLA's processes wait for each other's autotuning, for ever where their programs differ.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_shard_autotuning=false"

TIMEOUT_S = 5.0
E_LOCAL = 4
MOST_FAILURES = 5
SMALL = jax_ep.Rdma(ring_slots=2, ring_slot_bytes=2**15)  # credits are needed within an operation


class Checks:
    """Runs checks in step with the other processes."""

    def __init__(self, node_ranks, timed_tokens):
        self.node_ranks, self.timed_tokens = node_ranks, timed_tokens
        self.failed, self.done = [], 0
        self.rounds = 0  # of `agree` within a check
        self.configs = {
            "expert": jax_ep.Config(gpus_per_node=node_ranks, rdma=SMALL),
            "timed": jax_ep.Config(gpus_per_node=node_ranks),
            "near": jax_ep.Config(),  # the same GPUs as one node
        }
        devices = np.array(jax.devices())
        self.meshes = {
            name: Mesh(devices, (name,), axis_types=(AxisType.Auto,)) for name in self.configs
        }
        # Of operations: every batch is large, however small it is; or takes the path by its size.
        self.mesh, self.by_size = self.meshes["expert"], self.configs["expert"]
        self.config = dataclasses.replace(self.by_size, decode_tokens=0)
        self.R = len(devices)
        self.started: list[str] = []

    def initialize(self, *names):
        for name in names:
            jax_ep.initialize(
                self.meshes[name], name, timeout_s=TIMEOUT_S, config=self.configs[name]
            )
        self.started = list(dict.fromkeys([*self.started, *names]))

    def agree(self, fact, timeout_s=30):
        """What all processes say, by process; waits for them."""
        self.rounds += 1
        return self._say(f"{self.done}/{self.rounds}", fact, timeout_s)

    def _say(self, name, fact, timeout_s):
        meeting = _rendezvous.Meeting(f"nodes_program/{name}", jax.devices(), timeout_s)
        return {p: said["fact"] for p, said in meeting.exchange({"fact": fact}).items()}

    def compiled(self, f, *args):
        """`f` compiled for `args` in every process, so that none waits for another's compiler."""
        ready = f.lower(*args).compile()
        self.agree("compiled")
        return ready

    def __call__(self, name, check):
        began, wrong = time.monotonic(), ""
        try:
            check()
            jax_ep.check()
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        outcome = {"wrong": wrong[:400], "fault": _ffi.describe_faults()}
        said = self._say(f"{self.done}/end", outcome, 60)
        bad = {p: s["wrong"] for p, s in said.items() if s["wrong"]}
        print(
            f"{'FAILED' if bad else 'ok'} {name}, {time.monotonic() - began:.2f} s",
            *(f"\n   process {p}: {text}" for p, text in bad.items()),
            flush=True,
        )
        self.done, self.rounds = self.done + 1, 0
        if bad:
            self.failed.append(name)
        if any(s["fault"] for s in said.values()):
            print("   faults:", {p: s["fault"] for p, s in said.items()}, flush=True)
            time.sleep(0.5)
            self.initialize(*self.started)
        if len(self.failed) == MOST_FAILURES:
            self.conclude()
            sys.exit("stopped early")

    def conclude(self):
        failed = f"{len(self.failed)} of {self.done} checks failed: {self.failed}"
        print(failed if self.failed else f"all {self.done} checks passed", flush=True)

    def exchange(self, x, idx, weights, config=None, halves=False, combine=None, **options):
        """dispatch and combine against the reference, bit for bit; three times, the second other."""
        how_run = dict(config=config or self.config, halves=halves, combine=combine)
        f, args = program(x, idx, weights, mesh=self.mesh, **how_run, **options)
        ready = self.compiled(f, *args)
        whole = options.pop("zero_tail", None)
        how: dict[str, Any] = dict(layout=options.get("layout", "ragged"), whole=whole or None)
        by_node = dict(ranks_per_node=self.node_ranks) | (combine or {})
        want = reference(x, idx, weights, combine=by_node, **options)
        assert_matches(ready(*args), want, **how)
        other = np.roll(idx, 1, axis=1)
        changed = [args[0], put(flat(other), self.mesh, P("expert")), *args[2:]]
        later = [ready(*args) for args in (changed, args)]  # in flight together
        assert_matches(later[1], want, **how)
        want = reference(x, other, weights, combine=by_node, **options)
        assert_matches(later[0], want, **how)


def to_first_node(checks: Checks, x, idx):
    """All choices name experts there."""
    return x, np.where(idx < 0, idx, idx % (E_LOCAL * checks.node_ranks)).astype(np.int32)


def from_last_rank(_: Checks, x, idx):
    """The others choose nothing."""
    idx = idx.copy()
    idx[:-1] = -1
    return x, idx


def quantized(_: Checks, x, idx):
    return jax_ep.reference.quantize(x), idx


def raises(words, f, *args):
    try:
        jax.block_until_ready(f(*args))
    except Exception as error:
        assert all(word in str(error) for word in words), f"expected {words} in: {error}"
    else:
        raise AssertionError(f"expected an error with {words}")
