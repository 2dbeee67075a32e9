"""Your own service is found where you expect it."""

import re

from conftest import Service

ECHO = "def handle(text):\n    return text"


def test_it_is_found_where_the_command_was_started(service: Service) -> None:
    directory = service.home / "elsewhere"
    directory.mkdir()
    (directory / "service.py").write_text(ECHO)
    service.start("--handler", "service:handle", cwd=directory)
    assert re.fullmatch(r"\d+ here\n", service.ask("here"))


def test_it_is_found_beside_the_configuration_file_and_not_where_the_command_was_started(service: Service) -> None:
    directory = service.home / "configured"
    directory.mkdir()
    (directory / "our.toml").write_text('handler = "service:handle"')
    (directory / "service.py").write_text("def handle(text):\n    return 'beside the configuration'")
    service.write_handler("raise RuntimeError('the wrong one')")
    service.start("-c", "configured/our.toml")
    assert re.fullmatch(r"\d+ beside the configuration\n", service.ask("x"))


def test_it_may_be_in_a_package(service: Service) -> None:
    (service.home / "ours" / "deep").mkdir(parents=True)
    (service.home / "ours" / "words.py").write_text("WORD = 'deep down'")
    (service.home / "ours" / "deep" / "service.py").write_text(
        "from ..words import WORD\ndef handle(text):\n    return WORD")
    service.start("--handler", "ours.deep.service:handle")
    assert re.fullmatch(r"\d+ deep down\n", service.ask("x"))


def test_it_may_be_any_function_that_python_finds(service: Service) -> None:
    service.start("--handler", "html:escape")
    assert re.fullmatch(r"\d+ a &lt; b\n", service.ask("a < b"))


def test_its_import_leaves_no_compiled_files_behind(service: Service) -> None:
    service.write_handler(ECHO)
    service.start("--handler", "service:handle")
    assert service.run("--check", "--handler", "service:handle").returncode == 0
    assert not (service.home / "__pycache__").exists()
