# SPDX-License-Identifier: Apache-2.0
"""Published figures of DeepEP and UCCL-EP, as they were published, and the model's error on each."""

from typing import NamedTuple


class Figure(NamedTuple):
    """A published pair of figures; `unit` "us", or "gbs" as the project counts them."""

    case: str  # of scale_model.CASES
    unit: str
    dispatch: float
    combine: float
    source: str


_V1 = "DeepEP, docs/legacy.md"
_V1_FIRST = "DeepEP, README.md of the first release"
_V2 = "DeepEP, README.md of V2"
FIGURES = [
    Figure("V1 EP8", "gbs", 153, 158, _V1),
    Figure("V1 EP16", "gbs", 43, 43, _V1),
    Figure("V1 EP32", "gbs", 58, 57, _V1),
    Figure("V1 EP64", "gbs", 51, 50, _V1),
    Figure("V1 EP32", "gbs", 44, 47, _V1_FIRST),
    Figure("V1 EP64", "gbs", 46, 45, _V1_FIRST),
    Figure("V1 low latency EP8", "us", 77, 114, _V1),
    Figure("V1 low latency EP16", "us", 118, 195, _V1),
    Figure("V1 low latency EP32", "us", 155, 273, _V1),
    Figure("V1 low latency EP64", "us", 173, 314, _V1),
    Figure("V1 low latency EP128", "us", 192, 369, _V1),
    Figure("V1 low latency EP256", "us", 194, 360, _V1),
    Figure("V2 EP 8x2", "gbs", 90, 81, _V2),
    Figure("V2 EP 8x4", "gbs", 61, 61, _V2),
    Figure("UCCL-EP EP8", "us", 500, 973, "UCCL-EP, EP8 on H200, kernels of DeepEP V1"),
]


def compare(cases: dict[str, dict]) -> list[dict]:
    """Each figure beside its prediction; the error is of time, negative where we predict less."""
    rows = []
    for figure in FIGURES:
        row: dict = {"case": figure.case, "unit": figure.unit, "source": figure.source}
        for operation in ("dispatch", "combine"):
            published, predicted = getattr(figure, operation), cases[figure.case][operation]
            if figure.unit == "us":
                longer = predicted["us"] / published
            else:
                longer = published / predicted["gbs"]
            row[operation] = {
                "published": published,
                "predicted": predicted[figure.unit],
                "binds": predicted["binds"],
                "error_percent": round(100 * (longer - 1), 1),
            }
        rows.append(row)
    return rows
