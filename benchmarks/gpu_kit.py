"""Collects the wheels that a machine without a network lacks: benchmarks/gpu_kit.sh says how."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

PROJECT = Path(__file__).resolve().parents[1]
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17",
             "manylinux2014", "manylinux1")  # fmt: skip
NO_WHEELS = ("deepspeed",)  # sdists on PyPI, and plain Python as long as no kernel is built ahead


def project_needs(project: Path = PROJECT) -> list[Requirement]:
    """What the project and its tests need, from pyproject.toml."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    return [
        Requirement(line)
        for line in (*table["dependencies"], *table["optional-dependencies"]["test"])
    ]


def read_present(text: str) -> set[str]:
    """Names in the output of `pip freeze` (or one name a line)."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return {canonicalize_name(Requirement(line.split(" @ ")[0]).name) for line in lines if line}


def wheel_needs(wheel: Path, environment: Mapping[str, str]) -> list[Requirement]:
    """What a wheel needs on the machine that `environment` (markers) describes."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist") or ()]
    return [r for r in needs if r.marker is None or r.marker.evaluate(dict(environment))]


def collect(
    needs: Iterable[Requirement], present: set[str], into: Path, version: str
) -> list[Path]:
    """Downloads what is needed and not present, and what that needs in turn.

    Returns the wheels, in the order in which they were asked for.
    """
    environment = {
        "python_version": version, "python_full_version": f"{version}.0", "extra": "",
        "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
        "os_name": "posix",
    }  # fmt: skip
    waiting, seen, wheels = list(needs), set(present), []
    while waiting:
        need = waiting.pop(0)
        name = canonicalize_name(need.name)
        if name in seen:
            continue
        seen.add(name)
        wheel = fetch(need, into, version)
        wheels.append(wheel)
        waiting += wheel_needs(wheel, environment)
    return wheels


def fetch(need: Requirement, into: Path, version: str) -> Path:
    """One wheel, made from its sdist where there is no other."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    asked = f"{need.name}{need.specifier}"
    if canonicalize_name(need.name) in NO_WHEELS:
        argv = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(into), asked]
    else:
        argv = [*pip, "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
        argv += ["--python-version", version, "-d", str(into), asked]
        argv += [f"--platform={name}_x86_64" for name in PLATFORMS]
    subprocess.run(argv, check=True, env=os.environ | {"DS_BUILD_OPS": "0"})
    wanted = canonicalize_name(need.name)
    found = [w for w in into.glob("*.whl") if parse_wheel_filename(w.name)[0] == wanted]
    if len(found) != 1:
        raise SystemExit(f"{into}: {len(found)} wheels of {need.name}, 1 expected: empty it first")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--present", type=Path, required=True, help="the machine's `pip freeze`")
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--python-version", default="3.12")
    parser.add_argument("--also", action="append", default=[], help="e.g. trl==1.10.0")
    args = parser.parse_args()
    needs = [*project_needs(), *map(Requirement, args.also)]
    wheels = collect(needs, read_present(args.present.read_text()), args.into, args.python_version)
    for wheel in wheels:
        print(f"{wheel.stat().st_size:>10,}  {wheel.name}")


if __name__ == "__main__":
    main()
