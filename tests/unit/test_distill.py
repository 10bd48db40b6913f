"""distill.teacher: a finished run that stays as it is, and what objectives read of it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amclip_ds import config, preconditions
from amclip_ds.comm import Comm
from amclip_ds.data.captions import build_tokenizer
from amclip_ds.data.photometric import MEAN, STD
from amclip_ds.distill import FrozenTeacher, LibraryTowers
from amclip_ds.errors import UserError
from amclip_ds.evaluate.source import build_towers, locate
from amclip_ds.method import Method, method_of
from amclip_ds.model.config import Weighted
from amclip_ds.model.features import Features, StudentInputs, Terms, ViewGroup
from amclip_ds.objectives import OBJECTIVES, with_frozen
from amclip_ds.objectives.base import Objective
from tests.unit.evaluate.exports import tiny_model, write_export, write_run

CPU = torch.device("cpu")


class Imitate(Objective):
    """The cosine between the student's embeddings and the frozen teacher's."""

    features = frozenset({"image_embeds", "text_embeds"})
    targets = frozenset({"frozen_images", "frozen_texts"})
    views = (1,)

    def forward(self, features: Features, targets: tuple[Tensor, ...], comm: Comm) -> Terms:
        images, texts = targets
        assert features.image_embeds is not None and features.text_embeds is not None
        seen = (features.image_embeds * images.transpose(0, 1)).sum(-1).mean()
        return {"imitate": 2 - seen - (features.text_embeds * texts).sum(-1).mean()}


@pytest.fixture(autouse=True)
def imitate() -> Iterator[None]:
    OBJECTIVES["imitate"] = Imitate
    yield
    del OBJECTIVES["imitate"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill") / "run"
    write_run(folder)
    return folder


def method(*words: str) -> Method:
    return method_of(config.load("clip-tiny", list(words)))


def inputs(samples: int = 5) -> StudentInputs:
    """Three views, of which the last goes through the tower first."""
    torch.manual_seed(0)
    views = torch.randn(3, samples, 3, 64, 64)
    token_ids = torch.randint(1, 400, (samples, 8))
    token_ids[:, -1] = 49407
    return StudentInputs((ViewGroup((2,), views[2:]), ViewGroup((0, 1), views[:2])), {"plain": token_ids})


def test_it_sees_the_views_in_their_order_regardless_of_the_piece(run: Path) -> None:
    teacher, given = FrozenTeacher(str(run), config.load("clip-tiny").model, CPU), inputs()
    looked = teacher.embed(given, given.texts["plain"], micro=2)
    whole = teacher.embed(given, given.texts["plain"], micro=5)
    images, texts = looked["frozen_images"], looked["frozen_texts"]
    assert images.shape == (5, 3, 128) and texts.shape == (5, 128)
    assert not images.requires_grad and "frozen" in teacher.about
    for name in looked:
        torch.testing.assert_close(looked[name], whole[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(images[:, 2], teacher.towers.embed_images(given.groups[0].images[0]))
    torch.testing.assert_close(images[:, 1], teacher.towers.embed_images(given.groups[1].images[1]))


def test_an_objective_gets_what_it_asks_for_of_its_views_behind_its_other_targets() -> None:
    objectives = {"byol": OBJECTIVES["byol"].Options(), "imitate": Weighted(1.0)}
    looked = {"frozen_images": torch.randn(4, 3, 6), "frozen_texts": torch.randn(4, 6)}
    found = with_frozen(objectives, {"byol": (torch.ones(4),)}, looked)
    assert len(found["byol"]) == 1 and found["imitate"][0].shape == (4, 1, 6)
    assert torch.equal(found["imitate"][0][:, 0], looked["frozen_images"][:, 1])
    assert torch.equal(found["imitate"][1], looked["frozen_texts"])


def test_it_needs_no_average_of_the_student(run: Path) -> None:
    found = method("loss.imitate.weight=1", "data.num_views=2", f"distill.teacher={run}")
    assert found.reads_frozen and not found.needs_teacher and not found.wants
    assert not method("data.num_views=2").reads_frozen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.imitate.weight=1", "data.num_views=2"], "distill.teacher: loss.imitate compares with a finished model"),
        (["distill.teacher=/x"], "distill.teacher: no objective of this run reads it"),
        (["loss.imitate.weight=1", "distill.teacher=/x"], "loss.imitate.weight: this objective reads the views 1"),
        (
            ["loss.imitate.weight=1", "loss.imitate.views=[2]", "data.num_views=2", "distill.teacher=/x"],
            "loss.imitate.views: there is no view 2; there are 2, from 0 to 1",
        ),
    ],
)
def test_a_mistake_is_one_line_before_any_rank_starts(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        config.load("clip-tiny", words)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "neither a run"),
        (["model.text.context_length=99"], "reads texts of 77 tokens, the student of 99"),
        (["model.text.vocab_size=49409"], "another vocabulary"),
    ],
)
def test_a_teacher_that_does_not_fit(words: list[str], said: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="distill.teacher: ") as error:
        FrozenTeacher(str(run if words else tmp_path), config.load("clip-tiny", words).model, CPU)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_run_sees_the_views_at_its_own_size(run: Path) -> None:
    """Not at the student's, where its patches would show other parts of an object than those that it has learned."""
    student = config.load("clip-tiny", ["model.vision.image_size=60", "model.vision.patch_size=6", "mask.unit=1"]).model
    teacher, model = FrozenTeacher(str(run), student, CPU), build_towers(locate(str(run)), locate(str(run)).weights[-1])
    views = torch.randn(2, 3, 60, 60)
    resized = torch.nn.functional.interpolate(views, size=(64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher.towers.embed_images(views), model.embed_images(resized))


@pytest.mark.parametrize("fmt", ["open_clip", "hf"])
def test_an_export_teaches_as_the_model_that_it_was_made_of(fmt: str, tmp_path: Path) -> None:
    write_export(fmt, tmp_path / "export")
    teacher, given = FrozenTeacher(str(tmp_path / "export"), config.load("clip-tiny").model, CPU), inputs()
    module, _ = tiny_model()
    looked = teacher.embed(given, given.texts["plain"], micro=3)
    torch.testing.assert_close(looked["frozen_texts"], module.embed_texts(given.texts["plain"]), atol=1e-5, rtol=0)
    for view, images in ((2, given.groups[0].images[0]), (1, given.groups[1].images[1])):
        torch.testing.assert_close(looked["frozen_images"][:, view], module.embed_images(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(looked["frozen_scale"][0], module.logit_scale.exp())


def test_another_mean_and_size_are_the_librarys_own() -> None:
    class Given:
        model = torch.nn.Identity()
        image_size, device, mean_std, path = 32, CPU, ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)), Path("given")

        def tokenise(self, texts: list[str]) -> Tensor:
            return build_tokenizer()(texts, 77)

        def logit_scale(self) -> float:
            return 10.0

        def image(self, pixels: Tensor) -> Tensor:
            return pixels

    towers = LibraryTowers(Given(), config.load("clip-tiny").model)  # type: ignore[arg-type]
    plain = torch.rand(2, 3, 1, 1).expand(2, 3, 64, 64)
    ours = (plain - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(towers.embed_images(ours), (plain[..., :32, :32] - 0.5) / 0.25, atol=1e-5, rtol=1e-5)
    Given.tokenise = lambda self, texts: build_tokenizer()(texts, 77) + 1  # type: ignore[method-assign]
    with pytest.raises(UserError, match="another tokenizer than CLIP's"):
        LibraryTowers(Given(), config.load("clip-tiny").model)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["timm", "onnx"])
def test_an_export_without_both_towers_is_refused(fmt: str, tmp_path: Path) -> None:
    write_export(fmt, tmp_path / "export")
    with pytest.raises(UserError, match=f"distill.teacher: .*an export for {fmt}; name one for open_clip or transf"):
        FrozenTeacher(str(tmp_path / "export"), config.load("clip-tiny").model, CPU)


@pytest.mark.parametrize("source", ["run", "open_clip", "hf"])
def test_another_width_is_reported_before_any_rank_starts(source: str, run: Path, tmp_path: Path) -> None:
    folder = run
    if source != "run":
        folder = tmp_path / "export"
        write_export(source, folder)
    words = [f"distill.teacher={folder}", "model.embed_dim=64"]
    said = "its embeddings are 128 wide, the student's 64; set loss.clipkd.project_to=128, or model.embed_dim=128"
    with pytest.raises(UserError, match=said) as error:
        preconditions.check_teacher(config.load("clipkd-tiny", words))
    assert "\n" not in str(error.value)
    preconditions.check_teacher(config.load("clipkd-tiny", [*words, "loss.clipkd.project_to=128"]))
    with pytest.raises(UserError, match="128 wide, loss.clipkd.project_to is 32"):
        preconditions.check_teacher(config.load("clipkd-tiny", [*words, "loss.clipkd.project_to=32"]))


def test_a_teacher_of_shorter_texts_is_reported_before_any_rank_starts(run: Path) -> None:
    with pytest.raises(UserError, match="reads texts of 77 tokens, the student of 99"):
        preconditions.check_teacher(
            config.load("clipkd-tiny", [f"distill.teacher={run}", "model.text.context_length=99"])
        )


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("", "neither a run (config.yaml), a checkpoint (manifest.json) nor an export"),
        ("config.yaml", "no weights yet: neither student.safetensors nor a checkpoint"),
        ("checkpoints", "no weights yet: neither student.safetensors nor a checkpoint"),
        ("timm", "an export for timm; name one for open_clip or transformers"),
    ],
)
def test_what_holds_no_teacher_is_reported_before_any_rank_starts(
    there: str, said: str, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    if there == "timm":
        write_export("timm", folder)
    else:
        folder.mkdir()
    if there in ("config.yaml", "checkpoints"):
        (folder / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    if there == "checkpoints":  # as of a run that has not saved yet
        (folder / there).mkdir()
    write_export("open_clip", tmp_path / "run" / "exports" / "open_clip")
    (tmp_path / "run" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    of_a_run = f"distill.teacher={tmp_path}/run/exports/open_clip"
    preconditions.check_teacher(config.load("clipkd-tiny", [of_a_run]))
    with pytest.raises(UserError, match=re.escape(said)) as error:
        preconditions.check_teacher(config.load("clipkd-tiny", [f"distill.teacher={folder}"]))
    assert str(error.value).startswith("distill.teacher: ") and "\n" not in str(error.value)
