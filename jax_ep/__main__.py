# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep info`."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Parse the command and run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_ep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, devices, what this installation can do")
    info.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    from . import _info

    return _info.main(args.json)


if __name__ == "__main__":
    sys.exit(main())
