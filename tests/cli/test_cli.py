"""The program around the commands: help, version, speed, exit codes, the bar."""

from __future__ import annotations

import errno
import io
import logging
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import featinv_diffusion
from featinv_diffusion import cli
from featinv_diffusion.cli import exits
from featinv_diffusion.errors import InputError
from featinv_diffusion.runs.progress import progress_bar
from tests.cli.conftest import Featinv

ROOT = Path(featinv_diffusion.__file__).parents[1]


def test_help_lists_every_command(featinv: Featinv):
    done = featinv("--help")
    assert done.code == 0
    samples = ("sample", "interpolate", "compose", "variability", "concepts", "viz", "replay")
    others = ("evaluate", "classemb", "analyze", "layers", "scope", "export", "push", "convert")
    assert (*samples, *others) == cli.COMMANDS
    for name in (*cli.COMMANDS, *cli.GROUPS):
        assert f" {name} " in done.out


@pytest.mark.parametrize("command", [*cli.COMMANDS, *cli.GROUPS])
def test_every_command_has_help(featinv: Featinv, command):
    done = featinv(command, "--help")
    assert done.code == 0
    assert "--help" in done.out


def test_version(featinv: Featinv):
    assert featinv("--version").out == f"featinv {featinv_diffusion.__version__}\n"


def test_an_unknown_command(featinv: Featinv):
    done = featinv("sampel")
    assert done.code == 2
    assert "sample" in done.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['featinv', 'sample', '--help']\n"
        "from featinv_diffusion.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'timm', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"


# ---- exit codes --------------------------------------------------------------------------------


def outcome(program, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        exits.run(program)
    return stop.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def program() -> None:
        raise error

    return program


def test_bad_input_is_a_sentence(capsys):
    assert outcome(raising(InputError("This must be that.")), capsys) == (
        2,
        "Error: This must be that.\n",
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_sentence_that_names_the_file(capsys, code):
    status, said = outcome(raising(OSError(code, os.strerror(code), "/out/a.png")), capsys)
    assert status == 2
    assert "disk is full" in said
    assert "/out/a.png" in said


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_place_that_cannot_be_written_is_a_sentence(capsys, code):
    status, said = outcome(raising(OSError(code, os.strerror(code), "/out/a.png")), capsys)
    assert status == 2
    assert os.strerror(code) in said


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("bug"), RuntimeError("bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        exits.run(raising(error))


def test_a_note_is_one_line_and_said_once_however_often_the_program_runs(capsys):
    for _ in range(3):
        exits.run(lambda: logging.getLogger("featinv_diffusion.images").warning("%s is odd.", "a"))
    assert capsys.readouterr().err == "Note: a is odd.\n" * 3


# ---- the bar -----------------------------------------------------------------------------------


def run_bar() -> None:
    with progress_bar(4) as advance:
        for _ in range(4):
            advance(1.0)
            time.sleep(0.02)


def read_all(master: int) -> Iterator[bytes]:
    with os.fdopen(master, "rb", buffering=0) as screen:
        try:
            while chunk := screen.read(4096):
                yield chunk
        except OSError:  # how Linux says that the other end is closed
            return


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run_bar()
        monkeypatch.undo()
    drawn = b"".join(read_all(master)).decode()
    assert "sampling" in drawn
    assert "100%" in drawn
    assert "of 4 samples" in drawn


def test_no_bar_in_a_pipe(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    run_bar()
    assert pipe.getvalue() == ""
