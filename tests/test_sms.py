# SPDX-License-Identifier: Apache-2.0
"""The default number of SMs as `python -m jax_ep info` says it; csrc/tests has the arithmetic."""

import jax
import pytest

from jax_ep import _ffi, _info, _sms

H100 = 132, 3352.0, 478.0  # SMs, GB/s of memory, GB/s of links
pytestmark = pytest.mark.skipif(
    _ffi.default_sms_numbers() is None, reason="no compiled extension in this installation"
)


def test_info_says_the_rule_without_a_gpu():
    (rule,) = _sms.rule()
    assert "at 67 and 200 GB/s through memory an SM and 0.85 us a sum, times 1.25; " in rule
    assert "plans: all but 32, which others keep; small batches: all" in rule
    assert _info.default_sms([]) == [rule]


def test_a_gpu_is_described_by_what_it_says_of_itself():
    assert _sms.of_gpu("H100", H100, num_ranks=2, top_k=8, row_bytes=14336) == (
        "H100: 132 SMs, memory 3352 GB/s, links 478 GB/s: dispatch 63, combine 67 "
        "(R=2, K=8, rows of 14336 bytes)"
    )
    silent = _sms.of_gpu("new", (100, 0.0, 0.0), num_ranks=2, top_k=8, row_bytes=14336)
    assert "memory unknown, links unknown: dispatch 75, combine 75" in silent
    bound_by_links = _ffi.default_sms(H100, 8, 8, 14336)
    assert bound_by_links["dispatch"] < 63 and bound_by_links["combine"] < 67
    assert _ffi.default_sms(H100, 2, 6, 4096)["combine"] == 100  # short rows: sums bind


@pytest.mark.gpu
def test_gpus_say_their_speeds():
    for device in jax.local_devices(backend="gpu"):
        sms, memory_gbs, link_gbs = _ffi.device_speeds(device.local_hardware_id)
        assert sms == device.core_count and 300 < memory_gbs < 30000
        assert 50 < link_gbs < 2000 or jax.device_count("gpu") == 1
    lines = _info.default_sms(jax.devices("gpu"))
    kinds = {device.device_kind for device in jax.local_devices(backend="gpu")}
    assert [line.split(":")[0] for line in lines[1:]] == sorted(kinds)
