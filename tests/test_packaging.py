"""Wheel and source archive: built, installed and started in a fresh place, with the libraries that they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CLIENT, DAEMON, ROOT, Service, alive
from readme import adapted, block

pytestmark = pytest.mark.timeout(400)  # pip may have to fetch and build, beside much else that goes on
PATIENCE = 180  # s for one command
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = """
import os, sys
import hatchling.build as backend
os.makedirs(sys.argv[1])
backend.build_sdist(sys.argv[1])
backend.build_wheel(sys.argv[1])
"""


def run(*command: str | Path, **options: object) -> str:
    """The output of a COMMAND that must succeed."""
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=PATIENCE, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return str(done.stdout)


def install(python: Path, *packages: str | Path) -> None:
    """Install PACKAGES, with what they need, where PYTHON is.  Skips if they cannot be had."""
    done = subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile",
                           "--retries", "1", *map(str, packages)], capture_output=True, text=True, timeout=PATIENCE)
    if re.search("No matching distribution found|Could not find a version|No module named pip", done.stderr):
        pytest.skip(f"no packages to be had: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr


def environment(path: Path) -> Path:
    """A new virtual environment's commands."""
    run(sys.executable, "-m", "venv", "--without-pip", path)
    return path / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where wheel and source archive are, built from what git has, or from the archive that this is a copy of."""
    place = tmp_path_factory.mktemp("built")
    commands = environment(place / "environment")
    install(commands / "python", *PROJECT["build-system"]["requires"])
    try:
        tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")[:-1]
    except (AssertionError, FileNotFoundError):
        tracked = []
    if not tracked:  # in what is unpacked from the archive
        kept = re.compile(r"(?!__pycache__|build|dist)(\.ci|[^.])")
        tracked = [str(file.relative_to(ROOT)) for file in ROOT.rglob("*") if file.is_file()
                   and all(map(kept.match, file.relative_to(ROOT).parts))]
    copy = place / "copy"
    for name in tracked:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
            (copy / name).chmod((ROOT / name).stat().st_mode)
    run(commands / "python", "-c", BUILD, place / "dist", cwd=copy)
    yield place


def wheel(built: Path) -> Path:
    found, = (built / "dist").glob("*.whl")
    return found


def source_archive(built: Path) -> Path:
    found, = (built / "dist").glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def unpacked(built: Path) -> Path:
    """The source archive, unpacked in a place of its own."""
    place = built / "unpacked"
    place.mkdir()
    run("tar", "-xzf", source_archive(built), "-C", place)
    found, = place.iterdir()
    return found


def test_the_wheel_holds_the_two_commands_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(wheel(built)) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(name.rpartition(".data/")[2] for name in names) == ["scripts/daemontest.py", "scripts/testclient.py"]


def test_the_wheel_starts_where_it_is_installed(built: Path, service: Service) -> None:
    commands = environment(built / "fresh")
    install(commands / "python", wheel(built))
    scripts = [commands / "daemontest.py", commands / "testclient.py"]
    assert {script.read_text().split("\n")[0] for script in scripts} == {f"#!{commands / 'python'}"}
    assert f"-{run(scripts[0], '--version').split()[1]}-" in wheel(built).name
    started = run(scripts[0], "-p", str(service.port), env=service.env, cwd=service.home)
    assert started == f"daemontest.py: {service.manager()} started, 5 workers on port {service.port}\n"
    run(scripts[0], "-t", env=service.env, cwd=service.home)


def test_the_source_archive_starts_and_stops_by_the_commands_that_the_readme_begins_with(
        unpacked: Path, service: Service) -> None:
    """As they stand there, but for the port, which the configuration gives to the service."""
    service.configure(f"port = {service.port}\n")
    environment = {**service.env, "PIP_CACHE_DIR": run(sys.executable, "-m", "pip", "cache", "dir").strip()}

    def typed(command: str) -> str:
        return run("sh", "-c", command, cwd=unpacked, env=environment)

    set_up = block("python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/daemontest.py")
    *_, started = typed(adapted(set_up, {"python3 -m": f"{sys.executable} -m"})).strip().split("\n")
    manager = service.manager()
    assert started == f"daemontest.py: {manager} started, 5 workers on port {service.port}"
    ask, asked = block("$ echo あいう | .venv/bin/testclient.py").strip().split("\n")
    assert typed(f"{ask[2:]} -p {service.port}").split()[1:] == asked.split()[1:]
    assert typed(block(".venv/bin/daemontest.py -t")) == f"daemontest.py {manager} Server terminated.\n"
    assert not alive(manager)


def test_the_source_archive_tests_in_a_fresh_place(unpacked: Path) -> None:
    """Few tests as an example, but all are there."""
    assert os.access(unpacked / "daemontest.py", os.X_OK)
    assert {file.name for file in (unpacked / "tests").iterdir()} >= {
        file.name for file in (ROOT / "tests").glob("*.py")}
    few = ["tests/test_readme.py", "-k", "session"]
    tested = run(sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *few, cwd=unpacked)
    assert re.search(r"^\d+ passed, \d+ deselected", tested, re.MULTILINE)


def test_the_source_archive_holds_what_the_repository_does(built: Path) -> None:
    with tarfile.open(source_archive(built)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = {str(file.relative_to(built / "copy")) for file in (built / "copy").rglob("*") if file.is_file()}
    assert {name for name in kept - names if not name.startswith(".git")} == set()


# ---- The single files -------------------------------------------------------------------


@pytest.mark.parametrize(("script", "dependencies"), [
    (DAEMON, PROJECT["project"]["dependencies"]), (CLIENT, [])], ids=["daemontest.py", "testclient.py"])
def test_a_script_names_what_it_needs_as_the_project_does(script: Path, dependencies: list[str]) -> None:
    """In the form of PEP 723, with that document's own expression."""
    blocks = re.finditer(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script.read_text())
    found, = (match for match in blocks if match["type"] == "script")
    metadata = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ")
                                     for line in found["content"].splitlines(keepends=True)))
    assert metadata == {"requires-python": PROJECT["project"]["requires-python"], "dependencies": dependencies}


def test_without_its_libraries_it_says_in_one_line_what_to_install(service: Service) -> None:
    bare = [sys.executable, "-I", "-S"]  # none but Python's own
    done = subprocess.run([*bare, DAEMON, "-p", str(service.port)], capture_output=True, text=True, timeout=50,
                          stdin=subprocess.DEVNULL, env=service.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: .*; pip install python-daemon lockfile\n", done.stderr), done.stderr
    asked = subprocess.run([*bare, CLIENT, "--help"], capture_output=True, text=True, timeout=50)
    assert (asked.returncode, asked.stderr) == (0, "")
