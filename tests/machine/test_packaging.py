"""The package installs what README names, also where a path has a blank, and the single files run by themselves.

Skipped where the libraries cannot be fetched, and without uv, pipx, or the distribution's own packages.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import CLIENT, DAEMON, ROOT, Service, alive
from readme import adapted, block, program

pytestmark = pytest.mark.timeout(400)  # pip may have to fetch and build, beside much else that goes on
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = """
import os, sys
import hatchling.build as backend
os.makedirs(sys.argv[1])
backend.build_sdist(sys.argv[1])
backend.build_wheel(sys.argv[1])
"""


def run(*command: str | Path, **options: object) -> str:
    """The output of a COMMAND that must succeed.  Skips if it cannot fetch what it needs."""
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=180, **options)  # type: ignore[call-overload]
    if re.search("No matching distribution|Could not find a version|No module named pip|error sending request|"
                 "Failed to fetch", done.stderr):
        pytest.skip(f"no packages to be had: {done.stderr[-300:]}")
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return str(done.stdout)


def install(environment: Path, *packages: str | Path) -> Path:
    """Make a virtual ENVIRONMENT with PACKAGES, and what they need; its commands."""
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    run(sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "-q", "--no-compile",
        "--retries", "1", *packages)
    return environment / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where wheel and source archive are, built from a copy."""
    copy = tmp_path_factory.mktemp("packaging") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "tmp"))
    commands = install(copy.parent / "environment", *PROJECT["build-system"]["requires"])
    run(commands / "python", "-c", BUILD, copy.parent / "dist", cwd=copy)
    return copy.parent / "dist"


def test_first_commands_of_readme_work_as_they_stand(built: Path, tmp_path: Path, service: Service) -> None:
    """In what the source archive holds, in a path with a blank; but for the port, which the configuration gives."""
    archive, = built.glob("*.tar.gz")
    run("tar", "-xzf", archive, "-C", tmp_path)
    clone, = tmp_path.glob("daemontest-*")
    clone = clone.rename(tmp_path / "a clone")
    service.configure(f"port = {service.port}\n")
    built_with, = built.parent.glob("environment/lib/*/site-packages")  # what pip would fetch and install once more
    environment = {**service.env, "PIP_CACHE_DIR": run(sys.executable, "-m", "pip", "cache", "dir").strip(),
                   "PYTHONPATH": str(built_with), "PIP_NO_BUILD_ISOLATION": "0"}

    def typed(command: str) -> str:
        return run("sh", "-c", command, cwd=clone, env=environment)

    set_up = block(r"python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/daemontest.py")
    *_, started = typed(adapted(set_up, {"python3 -m": f"{sys.executable} -m"})).strip().split("\n")
    manager = service.manager()
    assert started == f"daemontest.py: {manager} started, 5 workers on port {service.port}"
    assert typed(f"echo x | .venv/bin/testclient.py -p {service.port}").endswith(" your text size: 3\n")
    assert typed(".venv/bin/daemontest.py -t") == f"daemontest.py {manager} Server terminated.\n"
    assert not alive(manager)
    assert (clone / "tests" / "machine" / "test_packaging.py").exists(), "the tests are there, too"


def test_wheel_installs_the_two_commands(built: Path, tmp_path: Path, service: Service) -> None:
    wheel, = built.glob("*.whl")
    commands = install(tmp_path / "with a blank", wheel)
    version = run(commands / "daemontest.py", "--version", env=service.env).split()[1]
    assert f"-{version}-" in wheel.name
    started = run(commands / "daemontest.py", "-p", str(service.port), env=service.env, cwd=service.home)
    assert started == f"daemontest.py: {service.manager()} started, 5 workers on port {service.port}\n"
    asked = run("sh", "-c", f'echo x | "$0" -p {service.port}', commands / "testclient.py")
    assert asked.endswith(" your text size: 3\n")
    run(commands / "daemontest.py", "-t", env=service.env, cwd=service.home)


def test_wheel_holds_the_two_modules_and_nothing_else(built: Path) -> None:
    wheel, = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(name for name in archive.namelist() if ".dist-info/" not in name) == [
            "_daemontest.py", "_testclient.py"]


@pytest.mark.parametrize(("script", "dependencies"), [
    (DAEMON, PROJECT["project"]["dependencies"]), (CLIENT, [])], ids=["daemontest.py", "testclient.py"])
def test_script_names_what_it_needs_as_the_project_does(script: Path, dependencies: list[str]) -> None:
    """In the form of PEP 723, with that document's own expression."""
    found = re.search(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script.read_text())
    assert found
    metadata = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ")
                                     for line in found["content"].splitlines(keepends=True)))
    assert metadata == {"requires-python": PROJECT["project"]["requires-python"], "dependencies": dependencies}


@pytest.mark.parametrize("runner", [["uv", "run"], ["pipx", "run"]], ids=["uv", "pipx"])
def test_copy_of_the_one_file_runs_by_itself(service: Service, runner: list[str]) -> None:
    command = [program(runner[0]), runner[1], f"{service.home}/daemontest.py"]
    shutil.copy(DAEMON, service.home)
    environment = {name: value for name, value in service.env.items() if name != "VIRTUAL_ENV"}
    run(*command, "-p", str(service.port), env=environment, cwd=service.home)
    assert service.ask("x").endswith(" your text size: 1\n")
    run(*command, "-t", env=environment, cwd=service.home)


def test_without_its_libraries_it_says_in_one_line_what_to_install(service: Service) -> None:
    bare = [sys.executable, "-I", "-S"]  # none but Python's own
    done = subprocess.run([*bare, DAEMON, "-p", str(service.port)], capture_output=True, text=True, timeout=50,
                          stdin=subprocess.DEVNULL, env=service.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"daemontest\.py: .*; pip install python-daemon lockfile\n", done.stderr), done.stderr
    asked = subprocess.run([*bare, CLIENT, "--help"], capture_output=True, text=True, timeout=50)
    assert (asked.returncode, asked.stderr) == (0, "")


def test_it_runs_with_the_packages_of_the_distribution(service: Service) -> None:
    python = Path("/usr/bin/python3")
    trial = "import sys, daemon, lockfile; sys.exit(sys.version_info < (3, 11))"
    if not python.exists() or subprocess.run([python, "-c", trial], capture_output=True, timeout=50).returncode:
        pytest.skip("no python3-daemon and python3-lockfile for a Python of 3.11 or later here")
    run(python, DAEMON, "-p", str(service.port), env=service.env, cwd=service.home)
    assert service.ask("x").endswith(" your text size: 1\n")
    assert run(python, DAEMON, "--reload", env=service.env, cwd=service.home).endswith(" reloaded\n")
    run(python, DAEMON, "-t", env=service.env, cwd=service.home)
