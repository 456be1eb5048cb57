"""The program around the commands: help, version, speed, exit codes, the bar."""

from __future__ import annotations

import errno
import io
import json
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
    samples = ("sample", "app", "encode", "decode", "interpolate", "compose", "compare", "edit")
    studies = (
        "patch",
        "variability",
        "concepts",
        "viz",
        "steerability",
        "replay",
        "evaluate",
        "merge",
    )
    others = ("classemb", "analyze", "layers", "paper", "new-backbone", "scope", "certainty")
    hub = ("export", "push", "convert")
    assert (*samples, *studies, *others, *hub) == tuple(cli.COMMANDS)
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


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug")])
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


# ---- --quiet, --verbose, --json, and two runs in one folder --------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_json_prints_the_manifest_alone(featinv: Featinv, photos: Path, first):
    arguments = ["sample", photos / "a.png", "--n-samples", 1, "-o", "out"]
    done = featinv("--json", *arguments) if first else featinv(*arguments, "--json")
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert done.code == 0
    assert json.loads(done.out) == {**manifest, "output": "out"}
    assert "mean cosine" in done.err


def test_json_of_a_command_that_writes_nothing(featinv: Featinv):
    found = json.loads(featinv("layers", "tiny/vit", "--filter", "blocks.1", "--json").out)
    assert {entry["layer"].partition(".attn")[0] for entry in found["layers"]} >= {"blocks.1"}
    assert all("blocks.1" in entry["layer"] for entry in found["layers"])
    assert featinv("layers", "tiny/vit", "--filter", "nosuch").code == 2


def test_quiet_prints_where_the_result_is(featinv: Featinv, photos: Path):
    (photos / "notes.txt").write_text("left out, which is a note")
    done = featinv("sample", photos, "--n-samples", 1, "-o", "out", "--quiet")
    assert (done.code, done.out, done.err) == (0, "out\n", "")


def test_quiet_prints_errors(featinv: Featinv):
    done = featinv("--quiet", "sample", "nowhere.png")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Error: ")


def test_verbose_prints_notes_for_one_run(featinv: Featinv, photos: Path):
    def run(*more: str) -> str:
        return featinv("sample", photos / "a.png", "--n-samples", 1, "-o", "out", *more).err

    before = logging.getLogger().level
    assert run() == ""
    assert "Info: Opened an inverter of the" in run("--verbose")
    assert run() == ""
    assert logging.getLogger().level == before


def test_completion_is_offered(featinv: Featinv):
    done = featinv("--help")
    assert "--install-completion" in done.out
    assert "--show-completion" in done.out


HOLD = """
import sys
from pathlib import Path
from featinv_diffusion.runs.record import reserved
with reserved(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_of_two_runs_in_one_folder_one_says_who_holds_it(featinv: Featinv, photos: Path):
    arguments = ["sample", photos / "a.png", "--n-samples", 1, "-o", "out"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, "out"], stdin=pipe, stdout=pipe, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = featinv(*arguments)
        assert done.code == 2
        assert f"({other.pid} on " in done.err
        assert not Path("out/manifest.json").exists()
        other.kill()
    assert featinv(*arguments).code == 0
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]


def test_a_refusal_leaves_no_new_folder(featinv: Featinv, photos: Path):
    done = featinv("sample", photos / "a.png", "--pipeline", "nowhere", "-o", "new/folder")
    assert done.code == 2
    assert not Path("new").exists()


def test_an_unreachable_hub_is_said(featinv: Featinv):
    for arguments in (["sample", "--pipeline", "user/name"], ["layers", "hf/user/name"]):
        done = featinv(*arguments)
        assert done.code == 2
        assert "Hub cannot be reached" in done.err
