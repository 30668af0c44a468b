# SPDX-License-Identifier: Apache-2.0
"""The one module that imports the compiled extension, which is optional."""

try:
    from jax_ep import _ext  # pyright: ignore[reportAttributeAccessIssue]
except ImportError as error:
    _ext, _missing = None, str(error)
else:
    _missing = None


def build_facts() -> dict:
    """What the extension says of itself, or why it is missing."""
    if _ext is None:
        return {"extension": False, "missing": _missing}
    return {"extension": True, **_ext.build_facts()}
