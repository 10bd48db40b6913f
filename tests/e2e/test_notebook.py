"""docs/python.ipynb does what it shows: its cells, in their order, in one fresh Python."""

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "python.ipynb"


def test_the_cells_run_in_their_order(tmp_path: Path) -> None:
    book = json.loads(NOTEBOOK.read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["nbformat"] == 4 and len(cells) == 5
    ending = 'import sys\nassert open("runs/first/exit.json") and "deepspeed" in sys.modules'
    script = "\n".join(["import matplotlib; matplotlib.use('agg')", *cells, ending])
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "attention.png").stat().st_size > 5000
