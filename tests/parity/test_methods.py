"""Other methods' masks and objectives against the published code's numbers: every methods/*.safetensors of
AMCLIP_ORACLE_DIR (its README says what each tensor is, and what cannot be compared)."""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import SHARED
from tests.parity import detailclip, masks, numbers, objectives, texts
from tests.parity.numbers import Numbers

FOLDER = Path(os.environ.get("AMCLIP_ORACLE_DIR", SHARED / "oracle")) / "methods"
FILES = sorted(FOLDER.glob("*.safetensors"))
Check = Callable[[Numbers], None]
CHECKS: dict[str, list[Check]] = {
    "flip": [masks.check_flip],
    "glip": [masks.check_centered, masks.check_centered_frequencies],
    "images": [masks.check_images],
    "cluster": [masks.check_cluster, masks.check_planted_cluster],
    "pgs": [masks.check_pgs, masks.check_pgs_whole, masks.check_released_balance],
    "sbam": [masks.check_salience],
    "ocl": [masks.check_disjoint, masks.check_occlusion],
    "text": [texts.check_tokens, texts.check_frequency, texts.check_syntax],
    "slip": [
        objectives.check_slip,
        objectives.check_slip_outputs,
        objectives.check_slip_joint_norm,
        objectives.check_slip_on_two_ranks,
    ],
    "siglip": [objectives.check_siglip, objectives.check_siglip_on_ranks],
    "fd": [objectives.check_feature_distillation],
    "detailclip": [detailclip.check_steps],
    "clipkd": [objectives.check_clipkd, objectives.check_clipkd_on_two_ranks],
}
SEED_0_ONLY = {
    masks.check_centered_frequencies: "keep_frequency.",
    texts.check_syntax: "syntax.",
}  # check -> the tensors that it is about
INPUTS = {  # what a file's checks start from: another value there is another question, not a wrong answer
    "flip": r".*\.noise",
    "glip": r".*\.noise",
    "images": r".*",
    "cluster": r".*_noise",
    "pgs": r".*_noise|embeddings|edges\.release|.*plus_sinkhorn|sinkhorn\..*\.in",
    "sbam": r".*\.(noise|tokens)",
    "slip": r"(in|w)/.*",
    "clipkd": r".*/(in|w)/.*",
    "fd": r"(in|w)/.*",
    "detailclip": r"step\d/in/.*|w/.*|teacher_w_before/.*",
    "siglip": r"in/.*|[^/]*/(log_scale|bias)",
    "ocl": r".*\.noise|loss\.cls_features|similarity\.cosine",
}
NOT_BUILT = r"teacher\d+/(grad_(gd|afd|cross_kd)/.*|w/(fusion|(visual|text)_fusion).*)"
NOT_COMPARABLE = {  # theirs, where nothing says what is right
    "cluster": r".*rule_topk\.keep|.*\.keep_order|.*\.keep",  # ties, and the release's unstable sort: row by row
    "pgs": r"ed1.*\.anchors|.*\.keep",
    "clipkd": r".*/grad_(gd|afd|cross_kd)/.*",  # objectives that are not built: its authors' sum has none of them
    "slip": r"grad_total/w/image_mlp\.layer[12]\.bias",  # zero in exact arithmetic: a batch norm follows
}

needs_oracle = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no oracle of methods at {FOLDER}")
every_file = pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])


def name_of(path: Path) -> str:
    return path.stem.rpartition("_seed")[0]


def checks_of(path: Path) -> list[Check]:
    """Those of the file, less those about what only seed 0 has."""
    found = read(path)
    return [c for c in CHECKS[name_of(path)] if c not in SEED_0_ONLY or found.names(SEED_0_ONLY[c])]


@cache
def read(path: Path) -> Numbers:
    return numbers.load(path)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@needs_oracle
def test_the_folder_holds_files() -> None:
    assert FILES, f"{FOLDER} exists but holds no *.safetensors"


@needs_oracle
@every_file
def test_the_file_is_known(path: Path) -> None:
    assert name_of(path) in CHECKS, f"{path.name}: no check reads it; add one to tests/parity/test_methods.py"


@needs_oracle
@pytest.mark.parametrize(
    ("path", "check"),
    [
        pytest.param(path, check, id=f"{path.stem}-{check.__name__}")
        for path in FILES
        for check in CHECKS.get(name_of(path), [])
    ],
)
def test_agrees(path: Path, check: Check) -> None:
    if check not in checks_of(path):
        pytest.skip("seed 0 only")
    check(read(path))


@needs_oracle
@every_file
def test_every_tensor_is_read(path: Path) -> None:
    found = numbers.load(path)
    for check in checks_of(path):
        check(found)
    unread = set(found.tensors) - found.read
    assert {name for name in unread if not re.fullmatch(NOT_BUILT, name)} == set()


def spoilt(path: Path, name: str) -> Numbers:
    """The file with one wrong element in a tensor."""
    found = read(path)
    tensor = found.tensors[name].clone()
    flat = tensor.view(-1)
    if tensor.is_floating_point():
        off = 0.02 if name.startswith("keep_frequency") else max(1e-3 * float(tensor.abs().max()), 1e-12)
        flat[int(flat.abs().argmax())] += off
    else:
        middle, most = flat.numel() // 2, int(flat.max())
        flat[middle] = 1 - flat[middle] if most <= 1 else (flat[middle] + 1) % (most + 1)
    return Numbers(path, found.tensors | {name: tensor}, found.meta)


def answers(path: Path) -> list[str]:
    """The tensors of a file that say what is right."""
    name = name_of(path)
    patterns = [held[name] for held in (INPUTS, NOT_COMPARABLE) if name in held]
    return [tensor for tensor in read(path).tensors if not any(re.fullmatch(p, tensor) for p in patterns)]


@needs_oracle
@every_file
def test_a_wrong_value_fails(path: Path) -> None:
    """Of every tensor in turn."""
    for name in answers(path):
        assert disagrees(spoilt(path, name)), f"a wrong value in {name} passes"


def disagrees(wrong: Numbers) -> bool:
    try:
        for check in checks_of(wrong.path):
            check(wrong)
    except AssertionError:
        return True
    return False


@needs_oracle
@every_file
def test_a_wrong_value_in_a_copied_file_fails(path: Path, tmp_path: Path) -> None:
    if not answers(path):
        pytest.skip("inputs alone")
    for file in path.parent.glob(f"images_seed{read(path).seed}.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(spoilt(path, answers(path)[-1]).tensors, tmp_path / path.name)
    (tmp_path / path.name).with_suffix(".json").write_text(json.dumps(read(path).meta))
    assert disagrees(numbers.load(tmp_path / path.name))


@needs_oracle
def test_an_unknown_file_is_no_known_one() -> None:
    with pytest.raises(AssertionError, match="no check reads it"):
        test_the_file_is_known(FOLDER / "other_seed0.safetensors")


@needs_oracle
def test_what_only_seed_0_has_is_left_out_elsewhere(tmp_path: Path) -> None:
    found = numbers.load(FOLDER / "glip_seed0.safetensors")
    kept = {name: tensor for name, tensor in found.tensors.items() if not name.startswith("keep_frequency")}
    save_file(kept, tmp_path / "glip_seed1.safetensors")
    (tmp_path / "glip_seed1.json").write_text(json.dumps(found.meta))
    assert checks_of(tmp_path / "glip_seed1.safetensors") == [masks.check_centered]
    with pytest.raises(pytest.skip.Exception, match="seed 0 only"):
        test_agrees(tmp_path / "glip_seed1.safetensors", masks.check_centered_frequencies)
