# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info`, `python -m jax_ep demo` and `python -m jax_ep bench`."""

import argparse
import importlib.util
import sys

SMS = [8, 16, 24, 32, 48, 64, "all"]


def main(argv: list[str] | None = None) -> int:
    """Parse the command and run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, what this installation can do")
    info.add_argument("--json", action="store_true", help="print JSON")
    demo = commands.add_parser("demo", help="train a small MoE language model for a minute")
    demo.add_argument(
        "--seconds", type=_positive(float), default=60.0, help="of training (60; less: not judged)"
    )
    demo.add_argument("--steps", type=_positive(int), help="stop after this many, unjudged")
    demo.add_argument("--out", default="demo.png", help="where the picture goes (demo.png)")
    demo.add_argument(
        "--size", choices=["small", "large"], help="of the model (small on CPUs, large on GPUs)"
    )
    demo.add_argument("--json", metavar="FILE", help="keep losses and loads")
    bench = commands.add_parser("bench", help="time the operations beside XLA's collectives")
    bench.add_argument(
        "--workload",
        choices=["prefill", "decode", "training", "smoke"],
        nargs="+",
        default=["prefill", "decode", "training"],
        help="sizes to run (all but smoke)",
    )
    bench.add_argument(
        "--sms",
        type=_sms,
        nargs="*",
        default=[48],
        metavar="N",
        help="also with so many SMs (48), alone and beside products of matrices; without numbers "
        f"{' '.join(map(str, SMS))}",
    )
    bench.add_argument(
        "--tokens", type=_positive(int), nargs="*", default=[], help="also with so many per rank"
    )
    bench.add_argument("--json", metavar="FILE", help="keep the results")
    bench.add_argument("--plot", metavar="FILE", help="a picture of time against SMs and tokens")
    args = parser.parse_args(argv)
    if args.command == "bench":
        if args.plot and importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot: expected matplotlib (pip install matplotlib), got none")
        from . import _bench

        return _bench.main(args.workload, args.sms or SMS, args.tokens, args.json, args.plot)
    if args.command == "demo":
        from . import _demo

        return _demo.main(args.seconds, args.steps, args.out, args.size, args.json)
    from . import _info

    return _info.main(args.json)


def _positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _sms(text: str) -> int | str:
    return text if text == "all" else _positive(int)(text)


_sms.__name__ = "positive int or all"


if __name__ == "__main__":
    sys.exit(main())
