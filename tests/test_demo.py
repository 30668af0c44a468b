# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_ep demo`."""

import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from jax_ep import _demo, _demo_report, _demo_text, _stats_file
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


def demo(folder, steps, environ):
    """What a run of the small size prints, and what it keeps."""
    options = ["--size", "small", "--steps", str(steps), "--json", "run.json", "--out", "small.png"]
    run = subprocess.run(
        [sys.executable, "-m", "jax_ep", "demo", *options],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=environ,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run, json.loads((folder / "run.json").read_text())


def test_a_short_run_from_anywhere(tmp_path):
    environ = {k: v for k, v in os.environ.items() if k != "NPROC"}
    flags = environ.get("XLA_FLAGS", "").split()
    environ["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    run, kept = demo(tmp_path, 3, environ)
    assert kept["devices"] == ["cpu"] * 8 and kept["sizes"]["hidden"] == 64
    assert np.shape(kept["losses"]) == (3,) and 5 < kept["losses"][0] < 7
    assert np.shape(kept["loads"]) == (3, 2, 8)
    assert np.sum(kept["loads"]) == 3 * 2 * 32 * 64 * 2  # steps, layers, sequences, bytes, top-2
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
        "wrote small.html",
    ):
        assert words in run.stdout, run.stdout
    for stage in ("routing", "dispatch", "experts", "combine"):
        assert re.search(rf"^ +{stage} +\d+\.\d\d ms", run.stdout, re.M), run.stdout
    width, height = png_size(tmp_path / "small.png")
    assert width > 800 and height > 800
    recorded = _stats_file.read(tmp_path / "small.npz")
    np.testing.assert_array_equal(recorded.load, kept["loads"])
    assert recorded.header.steps == 3 and not recorded.dropped.any()
    assert "8 x host devices" in (tmp_path / "small.html").read_text()


def compare(ours, theirs):
    """Losses of the same training on two platforms agree within rounding.

    The router chooses: where two scores are as good as equal, rounding decides, and the load of an
    expert may end on the other side of its mean, where its bias takes the other step. From there on
    the two runs are different trainings. So losses are within 1e-5 up to the first step whose loads
    differ, there by a few pairs of 8192, and within 1e-2 after it; starting from weights that differ
    by 1e-5 gives 2e-3.
    """
    losses, other = np.array(ours["losses"]), np.array(theirs["losses"])
    moved = np.abs(np.array(ours["loads"]) - theirs["loads"]).sum((1, 2))
    first = np.flatnonzero(moved)[0] if moved.any() else len(losses)
    np.testing.assert_allclose(losses[:first], other[:first], rtol=1e-5)
    np.testing.assert_allclose(losses, other, rtol=1e-2)
    assert first >= 1 and moved[: first + 1].max() <= 16
    return first


def test_compare_tells_rounding_from_error():
    kept = dict(losses=[6.0, 5.0, 4.0], loads=np.full((3, 2, 8), 1024).tolist())
    other = dict(losses=[6.0, 5.00002, 4.0], loads=kept["loads"])
    assert compare(kept, other) == 3
    other["loads"] = np.array(kept["loads"])
    other["loads"][2, 0, :2] += (1, -1)
    assert compare(kept, other | dict(losses=[6.0, 5.0, 4.01])) == 2
    for losses in ([6.0, 5.001, 4.0], [6.0, 5.0, 4.1]):
        with pytest.raises(AssertionError):
            compare(kept, other | dict(losses=losses))
    other["loads"][1, 0, :2] += (100, -100)
    with pytest.raises(AssertionError):
        compare(kept, other)


@pytest.mark.multi
def test_losses_on_gpus_are_those_on_cpu(tmp_path):
    """24 steps on two ranks in float32, products without TF32: see `compare`."""
    steps, common = 24, {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:2]
    environments = {
        "cpu": {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        },
        # The GPUs' memory may be held by this process.
        "gpu": {
            "JAX_PLATFORMS": "cuda",
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.08",
        },
    }
    kept = {}
    for platform, environment in environments.items():
        folder = tmp_path / platform
        folder.mkdir()
        _, kept[platform] = demo(folder, steps, os.environ | common | environment)
        assert len(kept[platform]["devices"]) == 2 and len(kept[platform]["losses"]) == steps
    assert kept["cpu"]["devices"] == ["cpu"] * 2 != kept["gpu"]["devices"]
    assert kept["cpu"]["sizes"] == kept["gpu"]["sizes"]
    losses = kept["gpu"]["losses"]
    assert losses[-1] < 0.7 * losses[0]
    same = compare(kept["gpu"], kept["cpu"])
    print(f"losses within 1e-5 for {same} of {steps} steps")


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
    assert main(["demo", "--no-report", "--out", str(tmp_path / "x.png")]) == status
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
    with pytest.raises(SystemExit):
        main(["demo", "--size", "huge"])
    assert "argument --size: invalid choice: 'huge'" in capsys.readouterr().err
    for option in ("--out", "--json"):
        assert main(["demo", option, "/nonexistent/demo.file"]) == 2
        assert f"{option}: expected a file in an existing directory" in capsys.readouterr().err
