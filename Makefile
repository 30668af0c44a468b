# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` make their own virtual environments and install everything.
PYTHON ?= python3
export NPROC ?= 64

.PHONY: demo test clean

demo:
	bash tests/run.sh demo "$(PYTHON)"

test:
	bash tests/run.sh test "$(PYTHON)"

clean:
	rm -rf .venv build
