"""What only reads settings loads no torch: the commands answer at once (config.py needs none)."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "timm", "deepspeed", "transformers", "open_clip", "numpy", "PIL")
REPORT = f"""
import sys, time
print("heavy:", [name for name in {HEAVY} if name in sys.modules], f"cpu {{time.process_time():.2f}} s")
"""
ACTIONS = {
    "import": "import amclip_ds",
    "help": "from amclip_ds import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass",
    "recipes": "from amclip_ds import cli\ncli.main(['recipes'])",
    "explain": "from amclip_ds import cli\ncli.main(['recipes', 'aclip-eff-vitb16', 'run.seed=3'])",
    "mistake": "from amclip_ds import cli\nassert cli.main(['train', 'aclip-tiny', 'optim.lr=-1']) == 2",
    "plan": "from amclip_ds import cli\ncli.main(['plan', 'aclip-vitl16', '--gpus', '64'])",
    "config": (
        "from amclip_ds import config\n"
        "from amclip_ds.engine.ds_config import read_ds_config\n"
        "settings = config.load('aclip-vitb16', ['data.train=/nowhere', 'eval.data=/nowhere'])\n"
        "read_ds_config(settings.engine), config.dump(settings), config.plan_batch(settings.batch, 8)"
    ),
    "listen": "from amclip_ds.resilience import preemption\npreemption.listen()",
    "launcher": "from amclip_ds.launch import run_ranks",
    "report": "from amclip_ds.report.page import write_report",
}


@pytest.mark.parametrize("action", ACTIONS)
def test_settings_are_read_without_torch(action: str) -> None:
    code = ACTIONS[action] + "\n" + REPORT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reported = done.stdout.strip().splitlines()[-1]
    print(action, reported)
    assert reported.startswith("heavy: []"), reported


def test_reading_settings_takes_little_cpu() -> None:
    """OmegaConf included; a bare interpreter takes 0.02 s. The least of three: others share the machine."""
    code = ACTIONS["config"] + "\n" + REPORT
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds = [float(done.stdout.rsplit("cpu ", 1)[1].split()[0]) for done in runs]
    print("CPU seconds of reading settings:", seconds)
    assert min(seconds) < 0.4, seconds


@pytest.mark.slow
def test_the_torchvision_fix_waits_for_torchvision() -> None:
    """And a heavy import is seen."""
    code = "import amclip_ds\nimport torchvision.transforms\n" + REPORT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'torchvision'" in done.stdout


@pytest.mark.parametrize(
    "module, command",
    [("submit", "submit"), ("commands.train", "train"), ("commands.evaluate", "eval"), ("commands.data", "data")],
)
def test_a_module_that_is_no_command_says_what_to_type(module: str, command: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"amclip_ds.{module}", "aclip-tiny"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"python -m amclip_ds.{module} runs nothing; type: python -m amclip_ds {command} " in done.stderr


def test_commands_are_imported_without_a_word() -> None:
    """The twin: what reads how the interpreter was started must not take an import for it."""
    for start in ("from amclip_ds.commands import train", "import amclip_ds.commands"):
        done = subprocess.run([sys.executable, "-c", start, "-m", "amclip_ds.commands.train"], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
