# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info | demo`."""

import argparse
import os
import sys

_HOST_DEVICES = "--xla_force_host_platform_device_count"


def _prepare_host_devices(count: int) -> None:
    """Make `count` host devices, unless the user chose; GPUs are used first all the same."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _HOST_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_HOST_DEVICES}={count}".strip()
    os.environ.setdefault("NPROC", "64")  # many host devices on few cores can starve XLA's pool


def main(argv: list[str] | None = None) -> int:
    """Parse the command and run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, what this installation can do")
    info.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("demo", help="train a small MoE language model; --help lists options")
    args, rest = parser.parse_known_args(argv)
    if args.command == "info":
        if rest:
            info.error(f"unrecognized arguments: {' '.join(rest)}")
        from . import _info

        return _info.main(args.json)
    _prepare_host_devices(8)
    from . import _demo

    return _demo.main(rest)


if __name__ == "__main__":
    sys.exit(main())
