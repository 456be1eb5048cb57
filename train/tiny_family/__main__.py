"""Train and pack the tiny family: `python -m train.tiny_family --data .data/tiny-imagenet-200`.

Runs the recipes of configs/tiny in order, each resumable, and writes the members that ship in the
package. A stage whose final weights exist is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from featinv_diffusion.cli import exits
from featinv_diffusion.config import read_setting
from train.tiny_family.family import (
    CONFIGS,
    MEMBERS,
    STAGES,
    fit_certainties,
    fit_operators,
    fit_scopes,
    pack_family,
    pack_member,
)


def _program(script: str) -> list[str]:
    """Networks that only this family has are modules here, the others are scripts for everyone."""
    shared = Path(f"train/{script}.py")
    return [str(shared)] if shared.is_file() else ["-m", f"train.tiny_family.{script}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="Tiny-ImageNet-200 folder; default: as in the configs")
    parser.add_argument("--output", default="featinv_diffusion/assets/tiny")
    parser.add_argument("--pack-only", action="store_true", help="pack the stages trained so far")
    parser.add_argument(
        "--member", choices=list(MEMBERS), help="pack this one alone, on the base that is there"
    )
    parser.add_argument("overrides", nargs="*", help="settings for every stage: run.cpu=true")
    arguments = parser.parse_intermixed_args()
    if arguments.member:
        config = CONFIGS / MEMBERS[arguments.member]
        family = Path(arguments.output)
        print(pack_member(config, family, arguments.member, replace_base=False))
        return
    overrides = [f"data.root={arguments.data}"] if arguments.data else []
    for script, name in () if arguments.pack_only else STAGES:
        config = CONFIGS / name
        if (Path(read_setting("run.output", config)) / "final").exists():
            continue
        command = [sys.executable, *_program(script), "--config", str(config)]
        code = subprocess.run([*command, *overrides, *arguments.overrides], check=False).returncode
        if code:
            sys.exit(code)
    for member in pack_family(Path(arguments.output)):
        print(member)
    if not arguments.pack_only:
        for fit in (fit_scopes, fit_certainties, fit_operators):
            for path in fit(Path(arguments.output), arguments.data):
                print(path)


if __name__ == "__main__":
    exits.run(main)
