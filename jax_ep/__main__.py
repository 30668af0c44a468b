# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info`, `demo`, `bench`, `memory` and `report`."""

import argparse
import dataclasses
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
    demo.add_argument(
        "--no-report",
        action="store_true",
        help="keep no statistics (.npz beside --out) and write no report of them (.html)",
    )
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
    memory = _add_memory(commands)
    report = commands.add_parser(
        "report", help="a run's statistics as a page: loads, drops, times, the slow rank"
    )
    report.add_argument(
        "files", nargs="+", metavar="FILE", help="what `Recorder.write` wrote, of each process"
    )
    report.add_argument("--out", metavar="PAGE", help="the page (FILE with .html)")
    report.add_argument("--no-png", action="store_true", help="no pictures beside the page")
    args = parser.parse_args(argv)
    if args.command == "memory":
        return _run_memory(memory, vars(args))
    if args.command == "bench":
        if args.plot and importlib.util.find_spec("matplotlib") is None:
            parser.error("--plot: expected matplotlib (pip install matplotlib), got none")
        from . import _bench

        return _bench.main(args.workload, args.sms or SMS, args.tokens, args.json, args.plot)
    if args.command == "demo":
        from . import _demo

        return _demo.main(
            args.seconds, args.steps, args.out, args.size, args.json, not args.no_report
        )
    if args.command == "report":
        from . import _report

        return _report.main(args.files, args.out, not args.no_png)
    from . import _info

    return _info.main(args.json)


def _add_memory(commands) -> argparse.ArgumentParser:
    memory = commands.add_parser(
        "memory", help="rows and bytes of a layer on each device, and drops"
    )
    for name, default, what in (
        ("tokens", 4096, "T, tokens per rank"),
        ("hidden", 7168, "H"),
        ("experts", 256, "E, over the whole group"),
        ("top-k", 8, "K, experts per token"),
        ("ranks", 8, "R, the size of the group"),
        ("alignment", 1, "expert_alignment"),
        ("layers", 1, "how many save for the backward pass"),
        ("samples", 32, "steps whose routing is drawn"),
    ):
        what = f"{what} ({default})"
        memory.add_argument(
            f"--{name}", type=_positive(int), default=default, metavar="N", help=what
        )
    memory.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    memory.add_argument("--wire", choices=["float8_e4m3fn"], help="wire_dtype of dispatch")
    memory.add_argument("--combine-wire", choices=["float8_e4m3fn"], help="wire_dtype of combine")
    memory.add_argument(
        "--deliver", choices=["dequantized", "quantized"], default="dequantized", help="with --wire"
    )
    memory.add_argument("--layout", choices=["ragged", "batched"], default="ragged")
    memory.add_argument(
        "--capacity-factor",
        type=_positive(float),
        nargs="*",
        default=[1.25, 2.0],
        metavar="F",
        help="bounds beside the worst case (1.25 2)",
    )
    memory.add_argument(
        "--skew",
        type=_positive(float),
        default=1.0,
        metavar="S",
        help="of the skewed routing: the popularity of an expert is exp(S * normal) (1)",
    )
    memory.add_argument("--json", action="store_true", help="print JSON")
    return memory


def _run_memory(parser: argparse.ArgumentParser, args: dict) -> int:
    import jax

    from . import _memory

    jax.config.update("jax_platforms", "cpu")  # planning leaves GPUs alone
    model = {field.name: args[field.name] for field in dataclasses.fields(_memory.Model)}
    options = {name: args[name] for name in ("layers", "samples", "skew")}
    try:
        return _memory.main(
            _memory.Model(**model), args["capacity_factor"], args["json"], **options
        )
    except (TypeError, ValueError) as error:
        parser.error(str(error))


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
