#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh demo|test [PYTHON]: what `make demo` and `make test` do.
# The tests run on the oldest and the newest supported Python that the machine has, each with the
# JAX it gets: 3.11 pins the oldest supported JAX, a newer Python takes the newest. Parts: job.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
what=$1 python=${2:-python3}
export NPROC=${NPROC:-64}
export PIP_COMPILE=0  # bytecode, most of which is never used: Python makes it at the first import,
unset PYTHONDONTWRITEBYTECODE  # and must keep it: hundreds of processes import JAX

supported() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

pythons() {  # every supported interpreter, "minor path", oldest first, one for each version
  { echo "$python"; compgen -c | grep -xE 'python3\.1[1-9]' || true
    ls "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python 2>/dev/null || true; } |
  while read -r p; do
    if supported "$p"; then echo "$(version "$p") $(command -v "$p")"; fi
  done | sort -t. -k2,2n -u
}

environment() {  # environment PYTHON NAME: the environment .venv/VERSION-NAME; prints its python
  local venv
  venv=$PWD/.venv/$(version "$1")-$2
  [ -x "$venv/bin/python" ] || "$1" -m venv "$venv"
  echo "$venv/bin/python"
}

install_needs() {  # install_needs PYTHON EXTRA...: what the project and these extras ask for
  local needs=()
  mapfile -t needs < <("$1" -c '
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [need for extra in sys.argv[1:] for need in project["optional-dependencies"][extra]]
print(*project["dependencies"], *(n for n in extras if not n.startswith("jax-ep")), sep="\n")
' "${@:2}")
  if [ "$(version "$1")" = 3.11 ]; then needs+=("jax==0.10.2" "jaxlib==0.10.2"); fi
  "$1" -m pip install -q --disable-pip-version-check "${needs[@]}"
}

install() {  # install PYTHON CMAKE_DEFINES ARGUMENT...: this checkout
  # Editable, so that in the repository's root, too, `import jax_ep` finds the compiled extension.
  SKBUILD_CMAKE_DEFINE=$2 "$1" -m pip install -q --disable-pip-version-check --no-deps "${@:3}" -e .
}

cuda() {  # the extra for the GPUs present: cuda13, cuda12 or nothing
  local drivers
  drivers=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
  case ${drivers%%.*} in
    5[89]?|[6-9]??) echo cuda13 ;;
    52[5-9]|5[3-7]?) echo cuda12 ;;
  esac
}

architectures() {  # what to compile for the GPUs present; nothing, and so the default, for others
  local capabilities
  capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u)
  case $capabilities in
    8.[0-9]) echo "JAX_EP_CUDA_ARCHITECTURES=80-real" ;;
    9.0) echo "JAX_EP_CUDA_ARCHITECTURES=90a-real" ;;
    10.0) echo "JAX_EP_CUDA_ARCHITECTURES=100a-real" ;;
  esac
}

no_gpu() { ! nvidia-smi >/dev/null 2>&1; }

compiles_quickly() { grep -q -- --Ofast-compile <<<"$(nvcc --help 2>/dev/null)"; }

supported "$python" || python=$(pythons | head -n 1 | cut -d' ' -f2)
[ -n "$python" ] || {
  echo "jax_ep needs Python 3.11 or newer with venv and ensurepip (Debian: python3-venv):" \
    "make $what PYTHON=/path/to/python" >&2
  exit 1
}

one=JAX_EP_CUDA_ARCHITECTURES=90a-real unoptimized=JAX_EP_UNOPTIMIZED=OFF
if no_gpu && compiles_quickly; then unoptimized=JAX_EP_UNOPTIMIZED=ON; fi  # none will run the kernels

if [ "$what" = demo ]; then
  echo "installing into .venv/$(version "$python")-demo ..."
  py=$(environment "$python" demo)
  # shellcheck disable=SC2046
  install_needs "$py" demo $(cuda)
  if no_gpu; then install "$py" "$unoptimized;$one"; else install "$py" "$(architectures)"; fi
  exec "$py" -m jax_ep demo
fi

all=$(pythons)
oldest=$(head -n 1 <<<"$all" | cut -d' ' -f2)
newest=$(grep -E '^3\.1[1-2] ' <<<"$all" | tail -n 1 | cut -d' ' -f2)
newest=${newest:-$oldest}
mkdir -p .venv
NEWEST=$(environment "$newest" test)
OLDEST=$(environment "$oldest" test)  # the same where there is one Python only
export NEWEST OLDEST

# pip's downloads take one core, compiling takes what is left. The newest gets its build environment
# from pip, as users do; the oldest takes what is compiled then.
if [ "$NEWEST" != "$OLDEST" ]; then
  install_needs "$OLDEST" test demo &
  needs_oldest=$!
fi
install "$NEWEST" "$unoptimized" -C "build-dir=$PWD/build/newest"
install_needs "$NEWEST" test docs demo &
needs_newest=$!
if [ "$NEWEST" != "$OLDEST" ]; then
  wait "$needs_oldest"
  isolation=()
  if command -v cmake >/dev/null && command -v ninja >/dev/null; then  # else pip gets them
    isolation=(--no-build-isolation)
  fi
  install "$OLDEST" "$unoptimized;JAX_EP_COMPILED=$PWD/build/newest" ${isolation[@]+"${isolation[@]}"}
fi
wait "$needs_newest"

# Two at a time, as compiling, which is most of the work, takes one core; the longest first.
rm -rf .venv/programs
jobs=(views pages models processes bits rest native lint)
[ "$newest" = "$oldest" ] || jobs=(oldest "${jobs[@]}")
printf '%s\n' "${jobs[@]}" | xargs -P 2 -n 1 bash tests/job.sh
