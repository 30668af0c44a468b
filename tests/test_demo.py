# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep demo`."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from jax_ep import _demo, _demo_report, _demo_text
from jax_ep.__main__ import main


def png_size(path):
    data = pathlib.Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)]


def test_text():
    text = _demo_text.standard_library()
    again = _demo_text.standard_library()
    np.testing.assert_array_equal(text.held_out, again.held_out)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts = (text.train.tobytes(), text.held_out.tobytes())
    for name in ("argparse.py", "json/decoder.py", "typing.py"):
        assert sum((root / name).read_bytes() in part for part in parts) == 1
    assert not any(pathlib.Path(np.__file__).read_bytes() in part for part in parts)
    assert 0.02 < len(text.held_out) / len(text.train) < 0.2
    p = np.unique(np.concatenate([text.train, text.held_out]), return_counts=True)[1]
    p = p / p.sum()
    assert text.unigram_entropy == pytest.approx(np.sum(p * np.log(1 / p)))


def test_windows():
    text = np.arange(10, dtype=np.uint8)
    want = [[2, 3, 4], [7, 8, 9]]
    np.testing.assert_array_equal(_demo_text.windows(text, np.array([2, 7]), 3), want)


def test_host_devices_leave_the_users_settings():
    environ = {"XLA_FLAGS": "--xla_a=1"}
    _demo.use_host_devices(environ)
    assert environ["XLA_FLAGS"].split() == ["--xla_a=1", "--xla_force_host_platform_device_count=8"]
    assert environ["NPROC"] == "64"
    own = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "NPROC": "3"}
    environ = dict(own)
    _demo.use_host_devices(environ)
    assert environ == own


def test_a_short_run_from_anywhere(tmp_path):
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    run = subprocess.run(
        [sys.executable, "-m", "jax_ep", "demo", "--steps", "3", "--out", "small.png"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environ,
    )
    assert run.returncode == 0, run.stderr
    for words in (
        "8 x host devices",
        "unigram entropy",
        "[##########] 100%",
        "tokens/s",
        "not judged: the run was cut short",
        "after 3 steps",
        "separately compiled",
        "imbalance",
        "layer 1",
        "wrote small.png",
    ):
        assert words in run.stdout, run.stdout
    for stage in ("routing", "dispatch", "experts", "combine"):
        assert re.search(rf"^ +{stage} +\d+\.\d\d ms", run.stdout, re.M), run.stdout
    width, height = png_size(tmp_path / "small.png")
    assert width > 800 and height > 800


@pytest.mark.parametrize(("criterion", "status"), [(0.01, 1), (9.0, 0)])
def test_a_full_run_is_judged(monkeypatch, tmp_path, capsys, criterion, status):
    class Model:
        pass

    history = _demo_report.History([5.0, 4.0], [np.ones((2, 8))] * 2, [(0, 6.0), (2, 4.0)])
    monkeypatch.setattr(_demo, "CRITERION", criterion)
    monkeypatch.setattr(_demo, "build", lambda mesh, sizes: (Model(), None))
    monkeypatch.setattr(_demo, "train", lambda *args: history)
    monkeypatch.setattr(_demo, "stage_times", lambda *args: {"routing": 1.0})
    monkeypatch.setattr(_demo_report, "heading", lambda *args: None)
    assert main(["demo", "--out", str(tmp_path / "x.png")]) == status
    verdict = "FAIL" if status else "PASS"
    assert f"criterion: below {criterion}: {verdict}" in capsys.readouterr().out
    png_size(tmp_path / "x.png")


@pytest.mark.parametrize("missing", ["flax", "optax", "matplotlib"])
def test_missing_extra(monkeypatch, capsys, missing):
    for name in [n for n in sys.modules if n.startswith(("jax_ep.examples", "jax_ep._demo_"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delattr("jax_ep._demo_report")
    assert main(["demo"]) == 2
    message = capsys.readouterr().err
    assert missing in message and 'pip install "jax-ep[demo]"' in message


def test_bad_options(capsys):
    for options in (["--seconds", "0"], ["--steps", "-1"], ["--seconds", "nan"], ["--steps", "x"]):
        with pytest.raises(SystemExit):
            main(["demo", *options])
        assert f"argument {options[0]}: invalid positive" in capsys.readouterr().err
    assert main(["demo", "--out", "/nonexistent/demo.png"]) == 2
    assert "existing directory" in capsys.readouterr().err
