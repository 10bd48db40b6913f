"""SHARDS as people write them: what is read, what is refused in its last form, and what is named for what it is."""

import errno
import gzip
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amclip_ds import cli, files, shard_tasks
from amclip_ds.data.config import DataConfig
from amclip_ds.data.train_sources import check_inputs, training_sources
from amclip_ds.errors import FAULT, AmclipError, UserError
from amclip_ds.evaluate.datasets import check_sets
from amclip_ds.shards.sources import expand_local, expand_shards, expand_sources
from tests.unit.data.shards import jpeg, write_shards, write_tar


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data/0.tar and data/1.tar, which is also the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_shards(tmp_path / "data", (3, 3))
    return tmp_path


def refused(spec: str, said: str, key: str = "SHARDS", allow_pipe: bool = False) -> None:
    with pytest.raises(UserError, match=said) as caught:
        expand_shards(spec, key, allow_pipe)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{key}: ")


# What is read


@pytest.mark.parametrize(
    "spec",
    [
        "data",
        "data/*.tar",
        "data/{0..1}.tar",
        "data/0.tar::data/1.tar",
        "~/data",
        "~/data/?.tar",
        "{~/data/0,data/1}.tar",
        "list.txt",
        "@list.txt",
        "@names",
        "data/0.tar::~/data/1.tar",
    ],
)
def test_ways_to_write_the_same_two_shards(spec: str, here: Path) -> None:
    (here / "list.txt").write_text(f"\ufeff# a comment\r\ndata/0.tar\r\n\n{here}/data/1.tar\n", encoding="utf-8")
    (here / "names").write_text("~/data/0.tar\nfile://" + str(here / "data" / "1.tar"))
    found = expand_shards(spec, "SHARDS")
    assert [Path(path).resolve() for path in found] == [here / "data" / "0.tar", here / "data" / "1.tar"]


def test_a_list_is_relative_to_itself(here: Path) -> None:
    (here / "lists").mkdir()
    (here / "lists" / "a.txt").write_text("../data/0.tar\nhttps://host/x.tar\n")
    assert expand_shards("lists/a.txt", "SHARDS") == ["lists/../data/0.tar", "https://host/x.tar"]


def test_sources_keep_apart(here: Path) -> None:
    assert expand_sources("data::data/1.tar", "SHARDS") == [["data/0.tar", "data/1.tar"], ["data/1.tar"]]
    assert expand_shards("file://localhost" + str(here / "data" / "0.tar"), "SHARDS") == [str(here / "data" / "0.tar")]
    assert expand_shards("HTTPS://user@host/{0..1}.tar", "SHARDS") == [f"https://user@host/{n}.tar" for n in (0, 1)]


def test_a_file_that_exists_is_itself_regardless_of_its_name(here: Path) -> None:
    for name in ("a{0,1}.tar", "b::c.tar", "d[1].tar", "@e.tar"):
        os.link("data/0.tar", name)
        assert [Path(shard).name for shard in expand_shards(name, "SHARDS")] == [name]


# No command and no other kind of URL, whatever brings it


COMMAND = "pipe:touch canary;cat data/0.tar"


@pytest.mark.parametrize(
    "spec",
    [COMMAND, f"{{{COMMAND},data/0.tar}}", f"data/0.tar::{COMMAND}", f"PIPE{COMMAND[4:]}", f"{{pipe,x}}{COMMAND[4:]}"],
)
def test_no_command_runs_unasked(spec: str, here: Path) -> None:
    refused(spec, "runs a shell command; --allow-pipe allows it")
    refused(
        spec,
        "runs a shell command; training reads by offset, which a pipe has not: write it to a file",
        key="data.train",
    )
    for action in ("index", "check", "stats"):
        assert cli.main(["data", action, spec]) == 2
    assert not (here / "canary").exists()


def test_a_list_names_no_command_though_pipes_are_allowed(here: Path) -> None:
    assert expand_shards(COMMAND, "SHARDS", allow_pipe=True) == [COMMAND]
    (here / "list.txt").write_text(f"data/0.tar\n{COMMAND}\n")
    with pytest.raises(UserError, match=r"SHARDS: list\.txt, line 2: .* runs a shell command; write its output"):
        expand_shards("list.txt", "SHARDS", allow_pipe=True)


@pytest.mark.parametrize("spec", ["*.tar", ".", "pipe*"])
def test_a_file_called_as_a_command_is_a_file(spec: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "trap").mkdir()
    (here / "trap" / "pipe:touch canary;cat x.tar").write_bytes((here / "data" / "0.tar").read_bytes())
    monkeypatch.chdir(here / "trap")
    assert expand_shards(spec, "SHARDS") == ["./pipe:touch canary;cat x.tar"]
    assert cli.main(["data", "index", spec, "--out", str(here / "index")]) == 0
    assert not (here / "trap" / "canary").exists()


def test_a_task_of_an_array_runs_no_command_unasked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard_tasks.main([COMMAND, str(here / "out"), "0", "1"]) == 2
    assert "--allow-pipe allows it" in capsys.readouterr().out and not (here / "canary").exists()


@pytest.mark.parametrize(
    "spec, said",
    [
        ("hf://datasets/a/b.tar", "hf:// is not read; known are file://, http://"),
        ("github://a:b@c/x.tar", "github:// is not read"),
        ("memory://x.tar", "memory:// is not read"),
        ("local:///etc/passwd", "local:// is not read"),
        ("ftp://host/x.tar", "ftp:// is not read"),
        ("data:application/x-tar;base64,AAAA", "no such shard"),
        ("simplecache::https://host/x.tar", "'simplecache::' begins a chain of URLs"),
        ("zip://a.tar::https://host/x.zip", "zip:// is not read"),
        ("https://host/{a:,b}:file:///etc/passwd", "is a chain of URLs"),
        ("file://host/x.tar", "names the machine 'host'"),
        ("https://***@host/x.tar", "from a record, which leaves secrets out"),
        ("https://host/list.txt", "a list of shards is read from a local file"),
        ("https://host/x.tar.gz", "a compressed tar"),
        ("s3://bucket/x.tar", r"needs s3fs \(pip install s3fs\)"),
        ("@nowhere", "the list nowhere: missing"),
        ("fifo.tar", "fifo.tar is not an ordinary file"),
        ("@fifo.tar", "the list fifo.tar: not an ordinary file"),
        ("empty.txt", "the list empty.txt names no shard"),
        ("nested.txt", r"nested\.txt, line 1: 'empty\.txt': a list names shards"),
        ("chain.txt", r"chain\.txt, line 1: no such shard"),
        ("scheme.txt", r"scheme\.txt, line 1: .*hf:// is not read"),
        ("data*", "data is a folder; give it alone"),
    ],
)
def test_what_is_refused_says_why(spec: str, said: str, here: Path) -> None:
    os.mkfifo("fifo.tar")
    (here / "empty.txt").write_text("# nothing\n")
    (here / "nested.txt").write_text("empty.txt\n")
    (here / "chain.txt").write_text("data/0.tar::data/1.tar\n")
    (here / "scheme.txt").write_text("hf://datasets/x.tar\n")
    with pytest.raises(UserError, match=said):
        expand_shards(spec, "SHARDS")


TROUBLED = {  # what is asked for -> (the call that fails, where)
    "data/0.tar": ("stat", "data/0.tar"),
    "data/{0..1}.tar": ("stat", "data/1.tar"),
    "data": ("scandir", "data"),
    "all.txt": ("open", "all.txt"),
    "data/*.tar": ("scandir", "data"),
}


@pytest.mark.parametrize("spec", TROUBLED)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_what_cannot_be_seen_just_now_is_not_missing(
    number: int, spec: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again; where it lasts, the machine's code."""
    Path("all.txt").write_text("data/0.tar\ndata/1.tar\n")
    shards = expand_shards(spec)
    name, where = TROUBLED[spec]
    call, left = getattr(os, name), [number] * (0 if "*" in spec else 2)

    def failing(path: Any = ".", *words: Any, **more: Any) -> Any:
        if left and str(path).endswith(where):
            raise OSError(left.pop(), os.strerror(number), path)
        return call(path, *words, **more)

    monkeypatch.setattr(files, "TROUBLE_PAUSES_S", (0.001,) * 3)
    monkeypatch.setattr(os, name, failing)
    if "*" in spec:
        monkeypatch.setattr(os, "listdir", failing)
    assert expand_shards(spec) == shards
    left[:] = [number] * 100
    with pytest.raises(AmclipError, match=f"{where} cannot be read: {os.strerror(number)}") as caught:
        expand_shards(spec)
    assert caught.value.exit_code == FAULT


def test_a_shard_that_may_not_be_seen_is_not_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Any, *words: Any, **more: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "stat", failing)
    refused("data/0.tar", "data/0.tar: Permission denied")


def test_evaluation_reads_files_alone(here: Path) -> None:
    assert expand_local("data/0.tar", "--data") == ["data/0.tar"]
    write_tar(here / "pets.tar", {"0.jpg": jpeg(), "0.cls": b"1"})
    assert expand_local("pets.tar", "--data") == ["pets.tar"], "labels are what it needs"
    with pytest.raises(UserError, match=r"--data: 'https://host/x\.tar' is a URL"):
        expand_local("https://host/x.tar", "--data")


def test_training_reads_no_pipe_even_where_it_is_allowed(here: Path) -> None:
    with pytest.raises(UserError, match="a pipe has no offsets"):
        training_sources(DataConfig(train=COMMAND, allow_pipe=True))
    with pytest.raises(UserError, match=r"data\.train: give the shards"):
        training_sources(DataConfig())


# What is no shard, named for what it is


def make_foreign(folder: Path) -> None:
    (folder / "jpgs").mkdir()
    for number in range(3):
        (folder / "jpgs" / f"{number}.jpg").write_bytes(jpeg(number))
    (folder / "table.csv").write_text("url,caption\n")
    (folder / "parquet").mkdir()
    (folder / "parquet" / "0.parquet").write_bytes(b"PAR1....PAR1")
    (folder / "disk" / "train").mkdir(parents=True)
    (folder / "disk" / "dataset_dict.json").write_text("{}")
    (folder / "disk" / "train" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    (folder / "mixed").mkdir()
    whole = (folder / "data" / "0.tar").read_bytes()
    (folder / "mixed" / "0.tar").write_bytes(whole)
    (folder / "mixed" / "1.tar.gz").write_bytes(gzip.compress(whole))
    (folder / "named.tar").write_bytes(gzip.compress(whole))
    (folder / "zst.tar").write_bytes(b"\x28\xb5\x2f\xfd" + whole[:100])
    (folder / "lfs.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (folder / "page.tar").write_text("<!DOCTYPE html><title>Log in</title>")
    write_tar(folder / "labels.tar", {f"{n}.cls": b"1" for n in range(3)})
    write_tar(folder / "pets.tar", {f"{n}.{kind}": jpeg(n) for n in range(3) for kind in ("jpg", "cls")})
    (folder / "empty").mkdir()


FOREIGN = [
    ("jpgs", r"no \.tar file in the folder jpgs; it holds 3 image\(s\) \(\.jpg\), and no \.txt.*amclip data pack"),
    ("jpgs/0.jpg", "is one image"),
    ("table.csv", "is a table, not shards"),
    ("parquet", r"holds 1 \.parquet file\(s\): a table"),
    ("disk", "holds a Hugging Face data set"),
    ("mixed", r"holds 1 compressed tar\(s\) \(1\.tar\.gz\) beside 1 \.tar: .*gunzip; 'mixed/\*\*/\*\.tar' takes the"),
    ("mixed/1.tar.gz", "is a compressed tar: .*gunzip"),
    ("named.tar", "is a compressed tar: .*gunzip"),
    ("zst.tar", "is a compressed tar: .*zstd -d"),
    ("lfs.tar", "is a pointer of Git LFS"),
    ("page.tar", "is a web page"),
    ("labels.tar", r"holds labels \(\.cls\) without images or captions"),
    ("pets.tar", r"holds images with labels \(\.cls\) and no captions"),
    ("empty", "no .tar file in the folder empty$"),
]


@pytest.mark.parametrize("spec, said", FOREIGN)
def test_other_data_are_named_for_what_they_are(spec: str, said: str, here: Path) -> None:
    make_foreign(here)
    refused(spec, said)
    with pytest.raises(UserError, match=said):
        check_inputs(DataConfig(train=spec), None)


@pytest.mark.parametrize("spec", ["parquet", "disk", "mixed/1.tar.gz", "named.tar"])
def test_other_data_to_evaluate_on_are_named_too(spec: str, here: Path) -> None:
    make_foreign(here)
    with pytest.raises(UserError, match=r"^eval\.data: "):
        check_inputs(DataConfig(train="data"), f"data::{spec}")
    check_inputs(DataConfig(train="data"), "data::jpgs::table.csv")  # images, or a list of them: the evaluation judges
    with pytest.raises(UserError, match=r"^eval\.data: table\.csv"):
        check_sets("table.csv")


def test_a_foreign_shard_among_many_is_no_damage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only some are checked at the start; the others are named where they are opened."""
    for number in range(2, 9):
        os.link("data/0.tar", f"data/{number}.tar")
    (here / "data" / "3.tar").unlink()
    (here / "data" / "3.tar").write_bytes(gzip.compress(b"tar"))
    assert cli.main(["data", "check", "data", "--workers", "1", "--json", "check.json"]) == 2
    assert "is a compressed tar: samples are read by offset" in (here / "check.json").read_text()


def test_a_folders_tars_are_those_that_a_person_means(here: Path) -> None:
    """Not copies in hidden folders; those behind a link, once; those in capitals."""
    for name in (".snapshot", ".rsync-partial", "deep/.Trash", "elsewhere"):
        (here / "data" / name if name != "elsewhere" else here / name).mkdir(parents=True)
    for copy in ("data/.snapshot/0.tar", "data/.rsync-partial/1.tar", "data/deep/.Trash/2.tar", "data/deep/.3.tar"):
        os.link("data/0.tar", copy)
    before = expand_shards("data", "SHARDS")
    assert not [path for path in before if "/." in path]
    os.link("data/0.tar", "elsewhere/4.tar")
    os.link("data/0.tar", "data/deep/5.TAR")
    (here / "data" / "linked").symlink_to(here / "elsewhere")
    (here / "data" / "again").symlink_to(here / "data" / "deep")
    (here / "data" / "round").symlink_to(here)
    (here / "elsewhere" / "back").symlink_to(here / "data")
    assert set(expand_shards("data", "SHARDS")) - set(before) == {"data/linked/4.tar", "data/deep/5.TAR"}


def test_a_set_that_is_trained_on_is_named(tmp_path: Path) -> None:
    """data.train=scenes beside eval.data=scenes: a folder's shards are all below it, the held-out ones too."""
    assert cli.main(["data", "synth", "--out", str(scenes := tmp_path / "scenes"), "--train", "8", "--test", "64"]) == 0
    [_, warned] = check_sets(str(scenes), expand_shards(str(scenes)))
    assert warned.startswith(f"{scenes}: warning: it is trained on, 1 of its files are in data.train, the first ")
    (tmp_path / "link").symlink_to(scenes)
    assert len(check_sets(str(scenes), expand_shards(str(tmp_path / "link")))) == 2
    assert len(check_sets(str(scenes), expand_shards(str(scenes / "train")))) == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "aclip-tiny", "data.train=jpgs"],
        ["train", "aclip-tiny", "data.train=table.csv", "--procs", "2"],
        ["train", "aclip-tiny", "data.train=data", "eval.data=disk"],
        ["submit", "aclip-tiny", "data.train=disk"],
        ["data", "index", "pets.tar"],
        ["data", "check", "parquet"],
        ["data", "stats", "named.tar"],
        ["eval", "run", "--data", "parquet"],
    ],
)
def test_they_are_named_before_torch_is_loaded(argv: list[str], here: Path) -> None:
    make_foreign(here)
    if argv[0] in ("train", "submit"):
        argv = [*argv, "run.out=run"]
    program = (
        "import sys; from amclip_ds import cli; code = cli.main(sys.argv[1:]);"
        "print([name for name in ('torch', 'deepspeed') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.endswith("[]\n"), (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"amclip {argv[0]}: ")
    assert not (here / "run").exists()


def test_check_takes_several_sources(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["data", "check", "data/0.tar", "data/1.tar", "--workers", "1"]) == 0
    assert "2 shards, expected 6, read 6" in out.getvalue()


def test_without_eval_data_the_present_folder_is_not_checked(here: Path) -> None:
    """It was taken for an evaluation set: a run started beside a json file was refused. Twin: named, it is refused."""
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "facts.json").write_text("{}")
    os.chdir(here / "elsewhere")
    for nothing in (None, ""):
        check_inputs(DataConfig(train=str(here / "data")), nothing)
    with pytest.raises(UserError, match=r"eval.data: .*json"):
        check_inputs(DataConfig(train=str(here / "data")), ".")
