# SPDX-License-Identifier: Apache-2.0
"""Run one command as N processes: `python tests/launch.py -n 4 -- pytest tests/multi`.

Each process (rank) finds in its environment what `jax.distributed.initialize` asks for, a
coordinator on a free port of this machine, its own number and how many they are, and writes its own
log. All of them are stopped, with their children, at the deadline or soon after one has failed.
The exit status is the worst of the ranks', 128 + signal for a death and 124 for the deadline.

Ranks run on the CPU, or on one GPU each with `--gpus COUNT`: rank r sees GPU r % COUNT.
`python` and `pytest` mean those of the interpreter that runs this file.
"""

import argparse
import contextlib
import math
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

TAIL_LINES = 60
DEADLINE_STATUS = 124


class Rank:
    """One process and all that it starts, in a process group of its own."""

    def __init__(self, number, command, env, log):
        self.number, self.log = number, log
        self.stopped = None  # why we stopped it, if we did
        self.start_s, self.end_s = time.monotonic(), None
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self):
        if self.end_s is None and self.process.poll() is not None:
            self.end_s = time.monotonic()
            self._kill_group()
        return self.end_s is None

    @property
    def status(self):
        """Exit status as a shell has it, 0 while running or when we stopped the rank."""
        code = self.process.returncode
        if code is None or self.stopped:
            return 0
        return code if code >= 0 else 128 - code

    def stop(self, why):
        """Ask Python for its stacks, which end up in the log, then kill."""
        if not self.running():
            return
        self.stopped = why
        self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        self._kill_group()
        self.process.wait()
        self.end_s = time.monotonic()

    def _kill_group(self):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def __str__(self):
        code = self.process.returncode
        how = f"exit {code}" if code >= 0 else f"died by {signal.Signals(-code).name}"
        how = f"stopped {self.stopped}" if self.stopped else how
        return f"rank {self.number}: {how} after {self.end_s - self.start_s:.1f} s, log {self.log}"

    def tail(self):
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"== rank {self.number}, end of {self.log}", *lines[-TAIL_LINES:]])


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("-n", "--processes", type=int, required=True, metavar="N")
    add("--devices-per-process", type=int, default=1, metavar="D", help="CPU devices of each rank")
    add("--gpus", type=int, metavar="COUNT", help="run on GPUs: rank r sees GPU r %% COUNT")
    add("--deadline-s", type=float, default=120.0, metavar="S")
    add("--grace-s", type=float, default=10.0, metavar="S", help="for the others once one failed")
    add("--logs", type=pathlib.Path, metavar="DIR", help="default: a new one, kept on failure")
    add("command", nargs="+", help="after --")
    return parser.parse_args(argv)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(args, rank, port, scratch):
    """This process's, less proxies (the coordinator is local), plus what makes a rank.

    `scratch`: a directory for pytest's temporary ones, which several of its processes that end at
    once would otherwise remove under each other.
    """
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(rank),
        "PYTEST_DEBUG_TEMPROOT": scratch,
        "PYTEST_ADDOPTS": f"{env.get('PYTEST_ADDOPTS', '')} -x -p no:cacheprovider",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if args.gpus:
        gpus = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
        env["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[rank % args.gpus]
        share = math.ceil(args.processes / args.gpus)
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.75 / share:.3f}")
    else:
        count = "--xla_force_host_platform_device_count"
        flags = [f for f in env.get("XLA_FLAGS", "").split() if not f.startswith(count)]
        env["XLA_FLAGS"] = " ".join([*flags, f"{count}={args.devices_per_process}"])
        env["JAX_PLATFORMS"] = "cpu"
        env.setdefault("NPROC", "64")  # XLA:CPU can starve with many devices on few cores
    return env


def wait(ranks, args):
    """Until all have ended, or must be stopped; returns why."""
    deadline = time.monotonic() + args.deadline_s
    while sum(rank.running() for rank in ranks):
        now = time.monotonic()
        failed = [rank for rank in ranks if rank.status]
        if failed and now > min(rank.end_s for rank in failed) + args.grace_s:
            return f"because rank {min(failed, key=lambda r: r.end_s).number} had failed"
        if now > deadline:
            return f"at the deadline of {args.deadline_s:g} s"
        time.sleep(0.02)
    return None


def main(argv=None):
    args = parse(argv)
    own = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest"]}
    command = [*own.get(args.command[0], args.command[:1]), *args.command[1:]]
    logs = args.logs or pathlib.Path(tempfile.mkdtemp(prefix="launch-"))
    logs.mkdir(parents=True, exist_ok=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    ranks, port, why = [], free_port(), "with the launcher"
    scratch = tempfile.mkdtemp(prefix="launch-pytest-")
    try:
        for r in range(args.processes):
            env = environment(args, r, port, tempfile.mkdtemp(prefix=f"rank{r}-", dir=scratch))
            ranks.append(Rank(r, command, env, logs / f"rank{r}.log"))
        why = wait(ranks, args)
    finally:
        for rank in ranks:
            rank.stop(why)
        shutil.rmtree(scratch, ignore_errors=True)
    worst = max(rank.status for rank in ranks)
    if why and why.startswith("at the deadline"):
        worst = max(worst, DEADLINE_STATUS)
    if worst:
        print(*(rank.tail() for rank in ranks), sep="\n\n", end="\n\n")
    else:
        print(ranks[0].log.read_text(errors="replace"), end="")
    print(*ranks, sep="\n")
    if not worst and not args.logs:
        shutil.rmtree(logs)
    return worst


if __name__ == "__main__":
    sys.exit(main())
