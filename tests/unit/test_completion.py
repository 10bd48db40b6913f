"""What a shell offers at TAB: asked as bash asks, with the sourced script of `amclip completion bash`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amclip_ds.cli import main
from amclip_ds.completion import script

ASK = """
amclip() {{ {python} -m amclip_ds "$@"; }}
source ./script
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
_python_argcomplete amclip
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def offered(line: str, folder: Path) -> list[str]:
    """COMPREPLY of a real bash with the cursor behind `line`."""
    (folder / "script").write_text(script("bash"))
    program = ASK.format(python=sys.executable, line=line)
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, env=dict(os.environ))
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "expected", "other"),
    [
        ("amclip re", "report", "train"),
        ("amclip data ch", "check", "synth"),
        ("amclip train aclip-vit", "aclip-vitb16", "clip-tiny"),
        ("amclip train aclip-tiny optim.weight_d", "optim.weight_decay=", "optim.lr="),
        ("amclip train aclip-tiny --pro", "--procs", "--resume"),
        ("amclip compare clip-tiny flip-t", "flip-tiny", "clip-tiny"),
    ],
)
def test_bash_is_offered(line: str, expected: str, other: str, tmp_path: Path) -> None:
    found = [word.rstrip() for word in offered(line, tmp_path)]
    assert expected in found and other not in found


def test_values_of_keys_that_have_few(tmp_path: Path) -> None:
    assert "centered" in {word.rstrip() for word in offered("amclip train aclip-tiny mask.strategy=c", tmp_path)}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_parses(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True)
