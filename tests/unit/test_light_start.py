"""What a rank and a loader worker import before a first step, and what they leave out (docs/results/start-time.md)."""

import subprocess
import sys

import pytest

from amclip_ds.module_alone import import_alone

pytestmark = pytest.mark.slow
# What nothing of a plain run needs, and what each once came in through.
LEFT_OUT = ("transformers", "open_clip", "accelerate", "scipy", "torch._inductor.compile_fx", "matplotlib", "sklearn")
RANK = """
import deepspeed
from deepspeed.runtime import compiler
from amclip_ds.engine.light_imports import import_muon_uncompiled
from amclip_ds.model.amclip import AClip
from tests.unit.model import tiny
import amclip_ds.train
AClip(tiny.model_config())
theirs = compiler.compile
import_muon_uncompiled()
assert compiler.compile is theirs
"""
WORKER = "import amclip_ds.data.worker_imports"


def loaded_by(code: str, *names: str) -> list[str]:
    """Which of these modules a fresh interpreter has after `code`."""
    code += f"\nimport sys\nprint([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return eval(done.stdout.strip().splitlines()[-1], {})


def test_a_rank_imports_what_it_runs() -> None:
    muon = "deepspeed.runtime.zero.muon.muon_optimizer"
    assert loaded_by(RANK, muon, *LEFT_OUT) == [muon]


def test_a_loader_worker_needs_no_model() -> None:
    assert loaded_by(WORKER, "timm", "torchvision", "deepspeed", "torch._dynamo", *LEFT_OUT) == []


def test_deepspeeds_muon_alone_brings_the_compiler() -> None:
    """The twin: where this fails, DeepSpeed has fixed it, and engine/light_imports.py is to go."""
    code = "import deepspeed.runtime.zero.muon.muon_optimizer"
    assert loaded_by(code, "torch._inductor.compile_fx") == ["torch._inductor.compile_fx"]


def test_a_muon_that_a_run_uses_stays_compiled() -> None:
    code = """
import deepspeed.runtime.zero.muon.original_muon as muon
from deepspeed.runtime import compiler
from amclip_ds.engine.light_imports import import_muon_uncompiled
import deepspeed.runtime.zero.muon.muon_optimizer
before, theirs = muon.muon_update, compiler.compile
import_muon_uncompiled()
assert muon.muon_update is before and compiler.compile is theirs
"""
    loaded_by(code)


def test_a_module_alone_is_the_packages_own() -> None:
    from open_clip import tokenizer

    alone = import_alone("open_clip", "tokenizer")
    assert alone.__file__ == tokenizer.__file__ and alone is import_alone("open_clip", "tokenizer")
    text = "A photo of 2 zebras, crossing the Straße (50 %) at naïve speed; 東京 isn't far."
    assert alone.SimpleTokenizer().encode(text) == tokenizer.SimpleTokenizer().encode(text)


@pytest.mark.parametrize("package, name", [("no_such_package", "tokenizer"), ("open_clip", "no_such_module")])
def test_a_module_that_is_not_there_is_an_import_error(package: str, name: str) -> None:
    with pytest.raises(ImportError, match=name if package == "open_clip" else package):
        import_alone(package, name)
