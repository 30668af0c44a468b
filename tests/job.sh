#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# job.sh NAME: one part of `make test`, whose output comes at its end. $NEWEST and $OLDEST are the
# Pythons of the environments with the newest and the oldest JAX.
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1

# What depends on JAX's version, and runs with the oldest JAX, too:
versions=(bad_input command_line global_view gradients in_flight install integrations lowering
  properties routing transforms xla_pieces)
# What compiles much or starts many processes, in parts, so that no core waits at the end:
models=(decode_example examples examples_fp8 global_view two_microbatches)
pages=(benchmarks demo docs wheels)
processes=(bench launch portable)

files() { printf 'tests/test_%s.py ' "$@"; }

# shellcheck disable=SC2046
tests() {  # tests PYTHON ARGUMENT...
  local python=$1
  shift
  "$(dirname "$python")/pytest" -q "$@"
}

report() {
  local status=$?
  printf '== %s: exit status %s after %s s\n' "$name" "$status" "$SECONDS" >&3
  cat ".venv/$name.log" >&3
}
exec 3>&1 >".venv/$name.log" 2>&1
trap report EXIT

# Programs that XLA does not optimise compile in two thirds of the time; those of `rest`, which
# compares bits, are optimised.
[ "$name" = rest ] || export XLA_FLAGS="--xla_backend_optimization_level=0"
case $name in
  rest) tests "$NEWEST" $(printf -- '--ignore=%s ' $(files "${models[@]}" "${pages[@]}" "${processes[@]}")) ;;
  models) tests "$NEWEST" $(files "${models[@]}") ;;
  pages) tests "$NEWEST" $(files "${pages[@]}") ;;
  processes) tests "$NEWEST" $(files "${processes[@]}") ;;
  oldest) tests "$OLDEST" tests/multi $(files "${versions[@]}") ;;
  lint)
    "$OLDEST" -m ruff check .
    "$OLDEST" -m ruff format --check .
    "$OLDEST" -m pyright --pythonpath "$OLDEST"
    git ls-files '*.cc' '*.h' '*.cu' '*.cuh' |
      xargs -r "$(dirname "$OLDEST")/clang-format" --dry-run --Werror
    ;;
esac
