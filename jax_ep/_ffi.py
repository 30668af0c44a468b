# SPDX-License-Identifier: Apache-2.0
"""The one module that imports the compiled extension, which is optional."""

import importlib.util

NOT_BUILT = (
    "not built: `pip install` found no working C++ compiler, or this checkout was never installed"
)

try:
    from jax_ep import _ext  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    _ext = None
    built = importlib.util.find_spec("jax_ep._ext") is not None
    _missing = f"built but not loadable: {error}" if built else NOT_BUILT
else:
    _missing = None


def build_facts() -> dict:
    """What the extension says of itself, or why it is missing."""
    if _ext is None:
        return {"extension": False, "missing": _missing}
    return {"extension": True, **_ext.build_facts()}
