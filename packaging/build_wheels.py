# SPDX-License-Identifier: Apache-2.0
"""Build the wheels of a release for the Python that runs this and the CUDA that its nvcc has.

    python packaging/build_wheels.py --out dist

`jax-ep` is the package with the extension compiled without CUDA; its extra `cuda13` (or `cuda12`)
asks for `jax-ep-cuda13` of the same version: the extension compiled with CUDA, in the package
`jax_ep_cuda13`, where `jax_ep/_ffi.py` finds it. Python 3.12 makes wheels for itself and all newer
ones, 3.11 those for 3.11. No wheel has CUDA libraries; the CUDA runtime is linked statically.
"""

import argparse
import base64
import hashlib
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CUDA_MAJORS = ("12", "13")
WITHOUT_CUDA = ("-C", "cmake.define.CMAKE_CUDA_COMPILER=NOTFOUND")
METADATA = """\
Metadata-Version: 2.1
Name: jax-ep-cuda{major}
Version: {version}
Summary: The CUDA {major} part of jax-ep
License: Apache-2.0
Requires-Python: >=3.11
Requires-Dist: jax-ep=={version}
"""


def main() -> None:
    """Build both wheels and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("dist"), help="(dist)")
    parser.add_argument(
        "--compiled",
        type=pathlib.Path,
        metavar="FOLDER",
        help="take the extension with CUDA from here instead of compiling it: an installed jax_ep",
    )
    parser.add_argument(
        "--no-build-isolation",
        action="store_true",
        help="build with what is installed, as pip has it",
    )
    args = parser.parse_args()
    isolation = ["--no-build-isolation"] if args.no_build_isolation else []
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        plain = pip_wheel(folder / "plain", *WITHOUT_CUDA, *isolation)
        compiled = args.compiled
        if compiled is None:
            with zipfile.ZipFile(pip_wheel(folder / "cuda", *isolation)) as wheel:
                wheel.extractall(folder)
            compiled = folder / "jax_ep"
        print(with_cuda_extras(plain, args.out))
        print(cuda_part(compiled, plain, args.out))


def pip_wheel(folder: pathlib.Path, *options: str) -> pathlib.Path:
    """The wheel that pip makes of this checkout, compiled in a build folder of its own."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder)]
    build = ["-C", f"build-dir={ROOT}/build/wheels-{folder.name}-{{wheel_tag}}"]
    subprocess.run([*command, *build, *options, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    if wheel.name.endswith("-none-any.whl"):
        sys.exit(
            "expected a working C++ compiler, got a wheel of pure Python: see `pip wheel -v .`"
        )
    return wheel


def with_cuda_extras(wheel: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The wheel of jax-ep whose CUDA extras ask for its CUDA parts; those of a checkout do not."""
    with zipfile.ZipFile(wheel) as archive:
        files = {n: archive.read(n) for n in archive.namelist() if not n.endswith(("/RECORD", "/"))}
    version = wheel.name.split("-")[1]
    (name,) = (n for n in files if n.endswith(".dist-info/METADATA"))
    header, blank, text = files[name].decode().partition("\n\n")
    for major in CUDA_MAJORS:
        header += f'\nRequires-Dist: jax-ep-cuda{major}=={version}; extra == "cuda{major}"'
    files[name] = (header + blank + text).encode()
    return write_wheel(out / wheel.name, files)


def cuda_part(compiled: pathlib.Path, plain: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The wheel of the CUDA part, from the folder with the compiled extension; tagged as `plain`."""
    _, version, tag = plain.stem.split("-", 2)
    libraries = sorted(compiled.glob("*.so"))
    facts = build_facts(next(p for p in libraries if p.name.startswith("_ext.")))
    if facts["version"] != version or not facts["cuda"]:
        sys.exit(f"{compiled}: expected an extension of version {version} with CUDA, got {facts}")
    major = facts["cuda"].split(".")[0]
    package, info = f"jax_ep_cuda{major}", f"jax_ep_cuda{major}-{version}.dist-info"
    with zipfile.ZipFile(plain) as archive:
        wheel_file = archive.read(f"jax_ep-{version}.dist-info/WHEEL")
    files = {f"{package}/{p.name}": p.read_bytes() for p in libraries}
    files[f"{package}/__init__.py"] = f'"""The CUDA {major} part of jax_ep."""\n'.encode()
    files[f"{info}/METADATA"] = METADATA.format(major=major, version=version).encode()
    files[f"{info}/WHEEL"] = wheel_file
    files[f"{info}/licenses/LICENSE"] = (ROOT / "LICENSE").read_bytes()
    return write_wheel(out / f"{package}-{version}-{tag}.whl", files)


def build_facts(extension: pathlib.Path) -> dict:
    """What an extension says of itself."""
    spec = importlib.util.spec_from_file_location("_ext", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_facts()


def write_wheel(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """A wheel of these files, and its RECORD (binary distribution format, PEP 427)."""
    info = "-".join(path.name.split("-")[:2]) + ".dist-info"
    record = ""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items(), key=lambda item: ".dist-info/" in item[0]):
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
            record += f"{name},sha256={digest.decode()},{len(data)}\n"
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


if __name__ == "__main__":
    main()
