"""`amclip samples`: what a step was trained on, found again from its number, in any world."""

import io
import json
import re
import tarfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from amclip_ds import config, samples
from amclip_ds.checkpoint import drift, manifest
from amclip_ds.cli import main
from amclip_ds.data.captions import build_tokenizer
from amclip_ds.data.exclude import read_excluded
from amclip_ds.data.loader import TrainingData
from amclip_ds.data.photometric import NUM_COLUMNS, Photometric
from amclip_ds.errors import UserError
from amclip_ds.model.amclip import AClip
from amclip_ds.model.init import Start, initialise
from tests.unit.checkpoint.test_save import save_steps

NUMBER, BATCH, POISONED = 40, 16, 11
WORDS = [
    f"batch.global_size={BATCH}",
    "run.steps=2000000",
    "model.vision.depth=1",
    "model.text.depth=1",
    "mask.strategy=none",
    "data.photometric=false",
    "data.captions=[txt]",
]


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (2, 2, 3), np.uint8)
    return Image.fromarray(pixels).resize((64, 64))


def caption(number: int) -> str:
    return f"a picture of thing number {number}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with settings and shards; one sample has another's caption."""
    folder = tmp_path_factory.mktemp("samples")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(NUMBER):
            held = io.BytesIO()
            picture(number).save(held, "PNG")
            text = caption(3 if number == POISONED else number)
            for suffix, content in (("png", held.getvalue()), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    settings = config.load("clip-tiny", [*WORDS, f"data.train={folder}/0.tar", f"run.out={folder}/run"])
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(config.dump(settings))
    return folder / "run"


def trained_on(run: Path, steps: int, world: int) -> list[list[int]]:
    """The ids of the first steps, as ranks of a world take them."""
    settings = samples.config_of(run)
    ids: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(world):
        with closing(
            TrainingData(
                settings.data,
                seed=settings.run.seed,
                global_batch=BATCH,
                rank=rank,
                world_size=world,
                image_size=64,
                teacher_size=None,
                num_units=0,
                context_length=77,
                index_dir=run,
            )
        ) as data:
            stream = data.batches(None)
            for step in range(steps):
                ids[step] += next(iter(stream)).sample_ids.tolist()
    return ids


@pytest.mark.parametrize("world", [1, 2])
def test_the_samples_of_a_step_are_those_that_it_was_trained_on(run: Path, world: int) -> None:
    expected = trained_on(run, 5, world)
    for step in (1, 2, 5):
        shown = samples.of_step(run, step, [], has_losses=False)
        assert [row.sample.sample_id for row in shown.rows] == expected[step - 1]
    assert samples.of_step(run, 1, [], False).rows != samples.of_step(run, 3, [], False).rows


def test_a_sample_is_what_is_in_the_shard(run: Path) -> None:
    shown = samples.of_step(run, 10**6 + 1, [], has_losses=False)
    assert shown.epoch == 10**6 // (NUMBER // BATCH)
    for row in shown.rows:
        sample = row.sample
        number = int(sample.key)
        with Path(sample.shard).open("rb") as file:
            file.seek(sample.offset)
            assert file.read(len(sample.image)) == sample.image
        assert Image.open(io.BytesIO(sample.image)).tobytes() == picture(number).tobytes()
        assert sample.caption == caption(3 if number == POISONED else number) and not sample.is_replacement
        assert all(len(box) == 4 and box[2] > 0 for box in row.boxes)


def overfitted(run: Path) -> None:
    """Weights that know every right pair, as the run's."""
    torch.manual_seed(0)
    module = AClip(config.load_run(run / "config.yaml").model)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.01)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(parameter)
    module.logit_scale.data.fill_(2.5)
    images = torch.stack([torch.from_numpy(np.array(picture(n))).permute(2, 0, 1) for n in range(NUMBER)])
    from amclip_ds.data import photometric
    from amclip_ds.evaluate.encoder import token_ids

    pixels, ids = photometric.normalise(images), token_ids(tuple(caption(n) for n in range(NUMBER)), 77)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(60):
        logits = module.logit_scale.exp() * module.embed_images(pixels) @ module.embed_texts(ids).T
        labels = torch.arange(NUMBER)
        loss = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(
        {n: p.detach() for n, p in module.named_parameters()},
        run / "student.safetensors",
        {"step": "400", "weights": "student"},
    )


def test_a_loss_is_of_the_views_that_meet_the_text() -> None:
    """SLIP's other two are changed strongly, and no text is compared with them."""
    settings = config.load("slip-tiny", [*WORDS[2:5], "data.train=x"])
    model = AClip(settings.model)
    initialise(model, Start(0, settings.model))
    torch.manual_seed(0)
    views = torch.randint(0, 255, (3, 5, 3, 64, 64), dtype=torch.uint8)
    ids = build_tokenizer()([caption(number) for number in range(5)])
    batch = SimpleNamespace(
        views_uint8=views, photometric=Photometric(np.zeros((3, 5, NUM_COLUMNS), np.float32)), token_ids=ids
    )
    alone = SimpleNamespace(views_uint8=views[:1], photometric=Photometric(batch.photometric.table[:1]), token_ids=ids)
    found = samples.losses_of(model, batch, settings.loss.views)  # type: ignore[arg-type]
    assert settings.loss.views == [0] and found == samples.losses_of(model, alone, None)  # type: ignore[arg-type]
    assert found != samples.losses_of(model, batch, None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_poisonous_sample_is_the_worst(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overfitted(run)
    step = next(n + 1 for n, ids in enumerate(trained_on(run, 6, 1)) if POISONED in ids and 3 not in ids)
    file, page = tmp_path / "step.json", tmp_path / "worst.html"
    words = ["samples", str(run), str(step), "--worst", "3", "--json", str(file), "--out", str(page)]
    assert main(words) == 0
    rows = json.loads(file.read_text())["samples"]
    assert len(rows) == BATCH and max(rows, key=lambda row: row["loss"])["key"] == f"{POISONED:04d}"
    assert f" {POISONED:04d} in " in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<img ") == 3 and "http" not in text.replace("http-equiv", "")


def test_a_sample_that_is_left_out_is_replaced_and_the_others_stay(run: Path, tmp_path: Path) -> None:
    step = next(n + 1 for n, ids in enumerate(trained_on(run, 6, 1)) if POISONED in ids)
    before = samples.of_step(run, step, [], has_losses=False)
    for line in (f"{POISONED:04d}", f"0.tar/{POISONED:04d}"):
        (tmp_path / "bad.txt").write_text(f"# seen in a spike\n{line}\n")
        after = samples.of_step(run, step, [f"data.exclude={tmp_path}/bad.txt"], has_losses=False)
        differing = [(old, new) for old, new in zip(before.rows, after.rows) if old != new]
        assert [old.sample.key for old, _ in differing] == [f"{POISONED:04d}"]
        assert differing[0][1].sample.is_replacement and differing[0][1].sample.sample_id != POISONED
        assert not after.incidents
    (tmp_path / "bad.txt").write_text(f"other.tar/{POISONED:04d}\n")
    assert samples.of_step(run, step, [f"data.exclude={tmp_path}/bad.txt"], False).rows == before.rows


def test_samples_that_the_run_did_not_have_are_refused(run: Path, tmp_path: Path) -> None:
    with samples.opened(samples.config_of(run)) as data:
        hashes = {"data": data.fingerprint, "contents": data.contents}
    assert not samples.of_step(run, 1, [], False).is_compared
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.yaml").write_text((run / "config.yaml").read_text())
    (copy / "data.json").write_text(json.dumps({"hashes": hashes}))
    shard = run.parent / "0.tar"
    with tarfile.open(shard) as whole, tarfile.open(tmp_path / "half.tar", "w") as half:
        for member in whole.getmembers()[:NUMBER]:
            half.addfile(member, whole.extractfile(member))
    (tmp_path / "bad.txt").write_text("0007\n")
    for word, said in (
        (f"data.train={tmp_path}/half.tar", "data.train: other samples, or in another order, than the run had"),
        (f"data.exclude={tmp_path}/bad.txt", "data.exclude: leaves out other samples than the run did"),
        ("run.seed=5", "run.seed=5: the samples would be others than the run's; data.train, data.index"),
        ("optim.lr=3", "optim.lr=3: the samples would be others"),
        ("data.workers=2", "data.workers=2: the samples would be others"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(said)}"):
            samples.of_step(copy, 1, [word], has_losses=False)
    moved = tmp_path / "0.tar"
    moved.write_bytes(shard.read_bytes())
    shown = samples.of_step(copy, 1, [f"data.train={moved}"], has_losses=False)
    assert shown.is_compared and [row.sample.key for row in shown.rows] == [
        row.sample.key for row in samples.of_step(run, 1, [], False).rows
    ]
    had = (run / "config.yaml").read_text()
    assert "final_lr: 0.0" in had
    (copy / "config.yaml").write_text(had.replace("final_lr: 0.0", "final_lr: 1.0"))  # refused of a run to come
    (copy / "versions.json").write_text("{}")
    assert samples.of_step(copy, 1, [f"data.train={moved}"], has_losses=False).rows == shown.rows
    with pytest.raises(UserError, match="STEP 2000001: the run has 2000000 steps"):
        samples.of_step(copy, 2000001, [], has_losses=False)
    (copy / "data.json").write_text(json.dumps({"hashes": hashes | {"contents": "other"}}))
    with pytest.raises(UserError, match="data.train: the same names, and other contents, than the run had"):
        samples.of_step(copy, 1, [], has_losses=False)


def test_the_data_of_a_step_is_that_of_the_checkpoint_which_follows(tmp_path: Path) -> None:
    save_steps(tmp_path / "checkpoints", 10, 20, keep_last=9)
    for step, content in ((10, "first"), (20, "later")):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        held = manifest.read(folder)
        held.hashes = {"data": content}
        (folder / manifest.NAME).write_bytes(manifest.dump(held))
    found = {step: samples.hashes_of(tmp_path, step)["data"] for step in (0, 1, 10, 11, 20, 30)}
    assert found == {0: "first", 1: "first", 10: "first", 11: "later", 20: "later", 30: "later"}


def test_a_resume_may_leave_samples_out_and_its_step_is_recorded() -> None:
    changes = drift.compare({"data.exclude": "None"}, {"data.exclude": "bad.txt"})
    assert not changes[0].is_free
    assert drift.refuse_or_allow(changes, drift.allowances([], "refuse")) == changes


def test_files_that_leave_nothing_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.exclude: .*missing"):
        read_excluded(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="names no sample"):
        read_excluded(str(tmp_path / "empty.txt"))


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["samples", str(tmp_path), "1"], "not a run's folder"),
        (["samples", str(run), "0"], "0 is below 1"),
        (["samples", str(run), "1", "data.train=/nowhere.tar"], "/nowhere.tar"),
    ):
        assert main(words) == 2
        printed = capsys.readouterr().err
        assert said in printed and len(printed.strip().splitlines()) == 1
