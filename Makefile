# SPDX-License-Identifier: Apache-2.0
# `make test` makes its own virtual environments and installs everything.
PYTHON ?= python3
export NPROC ?= 64

.PHONY: test clean

test:
	bash tests/run.sh test "$(PYTHON)"

clean:
	rm -rf .venv build
