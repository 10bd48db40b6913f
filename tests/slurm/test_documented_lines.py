"""Every block with `sbatch` or `amclip submit` of the README and the docs, run as a shell script on the local cluster
with its sizes and paths replaced: each job that it submits must complete."""

import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.slurm import runs
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.nightly

PAGES = ("README.md", "docs/cluster.md", "slurm/README.md")
SUBMITS = re.compile(r"sbatch [^`\n]*slurm/\w+\.sbatch|^amclip submit [^-]", re.M)
RUN_HERE = re.compile(r"amclip submit|sbatch|job=|for |cp ")  # the environment is there, and runs are tested elsewhere
SIZES = (  # of a cluster -> of this one: two nodes, two GPUs each
    (r"--nodes[= ]\d+", "--nodes=2"),
    (r"--gpus-per-node[= ]\d+", "--gpus-per-node=1"),
    (r"--cpus-per-gpu[= ]\d+", "--cpus-per-gpu=1"),
    (r" (--sbatch=)?--mem[= ]\w+", ""),
    (r"--array=0-7", "--array=0-1"),
    (r"--array=0-5%2", "--array=0-1%2"),
    (r"--seeds 3", "--seeds 1"),
    (r"--budget steps=\d+", "--budget steps=2"),
    (r"--chain 5", "--chain 2"),
    (r"in 1 2 3 4 5", "in 1 2"),
    (r"(a?clip)-vit[bs]16", r"\1-tiny"),
)
SETTING = re.compile(r" '?(data|eval|run(?!\.out))\.\w+=[^\s;)]+")


def scripts() -> list[tuple[str, str]]:
    """(page, text) of each code block, and of each inline command, that submits a job."""
    found = []
    for page in PAGES:
        text = (runs.ROOT / page).read_text()
        inline = re.findall(r"`(sbatch [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
        blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
        found += [(page, block) for block in [*blocks, *inline] if SUBMITS.search(block)]
    return found


def replaced(script: str, data: Path, folder: Path) -> str:
    """The script as it runs here: the paths are below `folder`, the settings those of a tiny run."""
    lines = script.replace("\\\n", " ").splitlines()
    text = "\n".join(re.split(r"\s+# ", line)[0] for line in lines if RUN_HERE.match(line))
    for pattern, value in SIZES:
        text = re.sub(pattern, value, text)
    text = re.sub(r"(data\.sbatch) '[^']+'", rf"\1 '{data}/train/{{00000..00005}}.tar'", text)
    text = re.sub(r"/eval/\w+", str(data), text)
    text = re.sub(r"/(scratch/\$USER|lustre/me|data)/(?!train/)", f"{folder}/", text)
    return "\n".join(_with_settings(line, data, folder) for line in text.splitlines())


def _with_settings(line: str, data: Path, folder: Path) -> str:
    """A line that trains, with a tiny run's recipe and settings in the place of its own."""
    kind = re.search(r"(train|sweep|compare)\.sbatch|amclip submit", line)
    if kind is None:
        return line
    line = SETTING.sub("", line).replace(" ...", "")
    out = folder / ("submitted" if kind[0] == "amclip submit" else "first")
    words = [word for word in runs.tiny(data, out, "run.steps=2")[1:] if kind[1] != "compare" or word[:4] != "run."]
    if "run.out=" in line:
        words = [word for word in words if not word.startswith("run.out=")]
    recipes = re.search(r"( a?clip-tiny)+", line)
    place = recipes.end() if recipes else kind.end()
    return f"{line[:place]} {'' if recipes else 'aclip-tiny '}{' '.join(words)}{line[place:]}"


def test_the_pages_submit_jobs() -> None:
    assert {page for page, _ in scripts()} == set(PAGES) and len(scripts()) >= 8


@pytest.mark.parametrize(("page", "script"), scripts(), ids=lambda text: text.split("\n")[0][:40])
def test_a_documented_submission_completes(
    page: str, script: str, cluster: Cluster, synthetic: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs.ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "lr.yaml").write_text("grid:\n  optim.lr: [1e-3, 2e-3]\n  mask.keep_ratio: [0.5, 0.25]\n")
    text = replaced(script, synthetic, tmp_path)
    bin_folder = Path(runs.PYTHON).parent
    env = cluster.env | runs.base_environment() | {"PATH": f"{bin_folder}:{cluster.env['PATH']}"}
    del env["AMCLIP_HOME"]  # submitted from the checkout, as documented
    before = jobs(cluster)
    done = subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    queue = partial(cluster.client, "squeue", "-h", check=False, timeout_s=300)
    cluster.poll(lambda: not queue(), "the queue to be empty", 1800, every_s=2)
    ended = {job: state for job, state in jobs(cluster).items() if job not in before}
    logs = "".join(path.read_text(errors="replace") for path in tmp_path.glob("*.out"))
    assert ended and set(ended.values()) == {"COMPLETED"}, f"{text}\n{ended}\n{logs}"


def jobs(cluster: Cluster) -> dict[str, str]:
    """State by job of every job that Slurm remembers."""
    shown = cluster.client("scontrol", "--oneliner", "show", "job", check=False)
    return dict(re.findall(r"^JobId=(\d+).*? JobState=(\w+)", shown, flags=re.M))
