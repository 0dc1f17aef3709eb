"""Shared by all tests: this folder on the import path (for `tiny`), one thread, and property tests that repeat exactly."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# messages are compared whole, however long the paths in them are
os.environ["COLUMNS"] = "400"
# tiny tensors only wait for further threads
torch.set_num_threads(1)
# a busy machine is no failure
settings.register_profile("attnctrl", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("attnctrl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-compatibility", action="store_true", help="write docs/compatibility.md anew")


@pytest.fixture
def call(capsys):
    """Run a command line; its exit code, stdout and stderr."""

    from attnctrl.cli import run

    def run_it(*arguments):
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run_it
