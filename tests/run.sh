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

install() {  # install PYTHON EXTRAS: into .venv/VERSION-FIRST_EXTRA, and print its python
  # Editable, so that in the repository's root, too, `import jax_ep` finds the compiled extension.
  local v venv jax=()
  v=$(version "$1") venv=.venv/$v-${2%%,*}
  [ -x "$venv/bin/python" ] || "$1" -m venv "$venv"
  if [ "$v" = 3.11 ]; then jax=("jax==0.10.2" "jaxlib==0.10.2"); fi
  "$venv/bin/python" -m pip install -q --disable-pip-version-check \
    -e ".[$2]" ${jax[@]+"${jax[@]}"} >&2
  echo "$venv/bin/python"
}

cuda() {  # the extra for the GPUs present: ",cuda13", ",cuda12" or nothing
  local drivers
  drivers=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
  case ${drivers%%.*} in
    5[89]?|[6-9]??) echo ,cuda13 ;;
    52[5-9]|5[3-7]?) echo ,cuda12 ;;
  esac
}

supported "$python" || python=$(pythons | head -n 1 | cut -d' ' -f2)
[ -n "$python" ] || {
  echo "jax_ep needs Python 3.11 or newer with venv and ensurepip (Debian: python3-venv):" \
    "make $what PYTHON=/path/to/python" >&2
  exit 1
}

if [ "$what" = demo ]; then
  echo "installing into .venv/$(version "$python")-demo ..."
  py=$(install "$python" "demo$(cuda)")
  exec "$PWD/$py" -m jax_ep demo
fi

all=$(pythons)
oldest=$(head -n 1 <<<"$all" | cut -d' ' -f2)
newest=$(grep -E '^3\.1[1-2] ' <<<"$all" | tail -n 1 | cut -d' ' -f2)
newest=${newest:-$oldest}
mkdir -p .venv
unoptimized=OFF
if ! nvidia-smi >/dev/null 2>&1 && grep -q -- --Ofast-compile <<<"$(nvcc --help 2>/dev/null)"; then
  unoptimized=ON  # no GPU here will run the kernels
fi
export SKBUILD_CMAKE_DEFINE="JAX_EP_UNOPTIMIZED=$unoptimized"
install "$newest" test,docs >.venv/newest &
if [ "$newest" != "$oldest" ]; then  # one architecture is enough the second time
  SKBUILD_CMAKE_DEFINE+=";JAX_EP_CUDA_ARCHITECTURES=90a-real"
  OLDEST=$(install "$oldest" test)
fi
wait $!
NEWEST=$(<.venv/newest)
export NEWEST OLDEST="${OLDEST:-$NEWEST}"

# Two at a time, as compiling, which is most of the work, takes one core; the longest first.
jobs=(models lint processes pages)
[ "$newest" = "$oldest" ] || jobs=(oldest "${jobs[@]}")
printf '%s\n' rest "${jobs[@]}" | xargs -P 2 -n 1 bash tests/job.sh
