#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# job.sh NAME: one part of `make test`, whose output comes at its end. $NEWEST and $OLDEST are the
# Pythons of the environments with the newest and the oldest JAX.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1

# What depends on JAX's version, and runs with the oldest JAX, too, but for tests marked `newest`:
versions=(bad_input command_line global_view gradients in_flight integrations lowering routing
  transforms xla_pieces)
# What compiles much or starts many processes, in parts, so that no core waits at the end:
bits=(edges properties xla_pieces)
models=(bias decode_example examples examples_fp8 two_microbatches)
native=(csrc emulation install)
pages=(benchmarks demo docs wheels)
processes=(bench launch portable)
views=(global_view gradients in_flight integrations transforms)

files() { printf 'tests/test_%s.py ' "$@"; }

# shellcheck disable=SC2046
tests() {  # tests PYTHON MARKS ARGUMENT...
  local python=$1 marks=$2
  shift 2
  "$(dirname "$python")/pytest" -q -m "not gpu and not multi and not extensive$marks" "$@"
}

report() {
  local status=$?
  times >".venv/$name.times"  # of the shell, then of what it ran: user and system
  printf '== %s: exit status %s after %s s, processors: %s\n' \
    "$name" "$status" "$SECONDS" "$(tail -n 1 ".venv/$name.times")" >&3
  cat ".venv/$name.log" >&3
}
exec 3>&1 >".venv/$name.log" 2>&1
trap report EXIT

# Programs that XLA does not optimise compile in two thirds of the time; those of `bits`, which
# compares bits in many shapes, are optimised, as users have them.
[ "$name" = bits ] || export XLA_FLAGS="--xla_backend_optimization_level=0"
# The parts and their many processes compile many of the same programs.
export JAX_COMPILATION_CACHE_DIR="$PWD/.venv/programs"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
case $name in
  rest)
    others=("${bits[@]}" "${models[@]}" "${native[@]}" "${pages[@]}" "${processes[@]}" "${views[@]}")
    tests "$NEWEST" "" $(printf -- '--ignore=%s ' $(files "${others[@]}"))
    ;;
  bits) tests "$NEWEST" "" $(files "${bits[@]}") ;;
  models) tests "$NEWEST" "" $(files "${models[@]}") ;;
  native) tests "$NEWEST" "" $(files "${native[@]}") ;;
  pages) tests "$NEWEST" "" $(files "${pages[@]}") ;;
  processes) tests "$NEWEST" "" $(files "${processes[@]}") ;;
  views) tests "$NEWEST" "" $(files "${views[@]}") ;;
  oldest)
    tests "$OLDEST" " and not newest" tests/multi $(files "${versions[@]}")
    "$OLDEST" -c 'import importlib, pkgutil, jax_ep.examples as examples
for module in pkgutil.iter_modules(examples.__path__):
    importlib.import_module(f"jax_ep.examples.{module.name}")'
    ;;
  lint)
    "$OLDEST" -m ruff check .
    "$OLDEST" -m ruff format --check .
    "$OLDEST" -m pyright --pythonpath "$OLDEST"
    git ls-files '*.cc' '*.h' '*.cu' '*.cuh' |
      xargs -r "$(dirname "$OLDEST")/clang-format" --dry-run --Werror
    ;;
esac
