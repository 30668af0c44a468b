# SPDX-License-Identifier: Apache-2.0
"""The load balancer beside the published algorithm (DeepSeek's EPLB) and round robin.

    python benchmarks/balance.py --json benchmarks/results/balance_cpu.json

256 experts in 64 layers, loads skewed in several ways, several seeds. Printed is the imbalance, the
busiest rank's load over the mean: the mean over layers and seeds, then the worst layer; and the time
of a solve. The run fails where a layer of ours is worse than the published algorithm's.

`published` is written after the published description, one layer and one item at a time. It gives
the placement of the published example (`EXAMPLE`), which is checked here, too.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from jax_ep import balance

EXPERTS, LAYERS = 256, 64
SETTINGS = {
    "hierarchical": dict(num_slots=288, num_ranks=32, num_nodes=4, num_groups=8),
    "global": dict(num_slots=288, num_ranks=32),
    "global, 144 ranks": dict(num_slots=288, num_ranks=144),
    "global, 8 ranks": dict(num_slots=264, num_ranks=8),
}
#: Loads, sizes and resulting experts of slots, as the published algorithm's description has them.
EXAMPLE = dict(
    loads=[
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    sizes=dict(num_slots=16, num_ranks=8, num_nodes=2, num_groups=4),
    experts=[
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ],
)


def skewed(kind: str, seed: int) -> np.ndarray:
    """Loads `[LAYERS, EXPERTS]`."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return rng.random((LAYERS, EXPERTS))
    if kind == "lognormal":
        return rng.lognormal(0, 1, (LAYERS, EXPERTS))
    exponent = float(kind.removeprefix("zipf "))
    return rng.permuted(np.tile(np.arange(1, EXPERTS + 1) ** -exponent, (LAYERS, 1)), axis=1)


KINDS = ["uniform", "lognormal", "zipf 0.5", "zipf 1", "zipf 1.5"]


def greedy(weights: list[float], packs: int) -> list[list[int]]:
    """Heaviest first, each item to the lightest pack with room."""
    size = len(weights) // packs
    if size == 1:
        return [[item] for item in range(packs)]
    held = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if len(held[p]) < size), key=total.__getitem__)
        held[pack].append(item)
        total[pack] += weights[item]
    return held


def published(loads, *, num_slots, num_ranks, num_nodes=1, num_groups=1) -> list[list[int]]:
    """Experts of slots, by the published algorithm."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    per_group = len(loads[0]) // num_groups
    layers = []
    for load in loads:
        groups = [sum(load[g * per_group : (g + 1) * per_group]) for g in range(num_groups)]
        slots = []
        for node in greedy(groups, num_nodes):
            experts = [g * per_group + i for g in node for i in range(per_group)]
            count = dict.fromkeys(experts, 1)
            replicas = list(experts)
            while len(replicas) < num_slots // num_nodes:
                hottest = max(experts, key=lambda e: load[e] / count[e])
                count[hottest] += 1
                replicas.append(hottest)
            packed = greedy([load[e] / count[e] for e in replicas], num_ranks // num_nodes)
            slots += [replicas[i] for rank in packed for i in rank]
        layers.append(slots)
    return layers


def by_published(loads: np.ndarray, **sizes) -> balance.Placement:
    """The published algorithm's placement."""
    experts = published(loads.tolist(), **sizes)
    return balance.placement(experts, num_experts=loads.shape[1], num_ranks=sizes["num_ranks"])


def check_example() -> dict:
    """Imbalance of each layer of the published example; raises unless `published` gives it."""
    loads, sizes = np.array(EXAMPLE["loads"], float), EXAMPLE["sizes"]
    theirs = by_published(loads, **sizes)
    if theirs.experts.tolist() != EXAMPLE["experts"]:
        raise AssertionError(f"published: expected the example, got {theirs.experts.tolist()}")
    ours = dict(hierarchical=sizes, **{"global": dict(num_slots=16, num_ranks=8)})
    rows = {name: balance.imbalance(loads, balance.solve(loads, **s)) for name, s in ours.items()}
    rows["published"] = balance.imbalance(loads, theirs)
    if (rows["hierarchical"] > rows["published"]).any():
        raise AssertionError(f"hierarchical: expected no layer worse than published, got {rows}")
    return {name: row.round(4).tolist() for name, row in rows.items()}


def compare(sizes: dict, kind: str, seeds: int) -> dict:
    """Imbalance of the three, and seconds of our solves; raises where ours is worse."""
    found = {name: [] for name in ("ours", "published", "round robin")}
    seconds = []
    for seed in range(seeds):
        loads = skewed(kind, seed)
        start = time.perf_counter()
        ours = balance.solve(loads, **sizes)
        seconds.append(time.perf_counter() - start)
        plain = balance.round_robin(
            EXPERTS,
            num_slots=sizes["num_slots"],
            num_ranks=sizes["num_ranks"],
            num_layers=LAYERS,
        )
        made = {"ours": ours, "published": by_published(loads, **sizes), "round robin": plain}
        for name, placement in made.items():
            found[name].append(balance.imbalance(loads, placement))
    worse = np.array(found["ours"]) > np.array(found["published"]) * (1 + 1e-12)
    if worse.any():
        raise AssertionError(f"{kind}: {worse.sum()} layers worse than the published algorithm's")
    rows = {
        name: dict(mean=round(float(np.mean(v)), 4), worst=round(float(np.max(v)), 4))
        for name, v in found.items()
    }
    return rows | dict(seconds=round(statistics.median(seconds), 4), slowest=round(max(seconds), 4))


def main() -> None:
    """Compare, print, and keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args()
    load_before = os.getloadavg()
    example = check_example()
    print("published example, imbalance of its layers:", example)
    results = {}
    for setting, sizes in SETTINGS.items():
        print(f"\n{setting}: {EXPERTS} experts x {LAYERS} layers, {sizes}")
        print(f"{'loads':10} {'ours':>15} {'published':>15} {'round robin':>15} {'solve s':>9}")
        for kind in KINDS:
            row = compare(sizes, kind, options.seeds)
            results[f"{setting}; {kind}"] = row
            cells = [f"{v['mean']:8.4f} {v['worst']:6.3f}" for v in list(row.values())[:3]]
            print(f"{kind:10} {' '.join(cells)} {row['seconds']:9.3f}")
    if options.json:
        facts = dict(
            command=shlex.join(["python", *sys.argv]),
            python=platform.python_version(),
            numpy=np.__version__,
            machine=platform.machine(),
            cpu_count=os.cpu_count(),
            load_before=load_before,
            load_after=os.getloadavg(),
            seeds=options.seeds,
            experts=EXPERTS,
            layers=LAYERS,
            settings=SETTINGS,
        )
        text = json.dumps(facts | dict(example=example, results=results), indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
