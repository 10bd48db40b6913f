"""What is hidden from records, and what is not; and that nothing a run writes or prints holds a secret."""

import json
from pathlib import Path

import pytest

from amclip_ds import config
from amclip_ds.cli import main
from amclip_ds.data.train_sources import check_inputs
from amclip_ds.errors import UserError
from amclip_ds.jsonl import append_line
from amclip_ds.redact import redact, redact_all
from amclip_ds.run_folder import describe_versions, open_folder, write_verdict
from amclip_ds.shards import reader
from amclip_ds.shards.index import Index, build_index, default_folder
from tests.unit.data.damaged import samples, tar_of
from tests.unit.data.faulty_server import FaultyServer

SECRET = "s3cr3tV4lue"
SIGNED = f"https://bucket.s3.amazonaws.com/a.tar?X-Amz-Credential=AK%2F2&X-Amz-Date=1&X-Amz-Signature={SECRET}&part=7"


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host/a.tar",
        f"https://me:p@{SECRET}@host/a.tar",
        f"https://{SECRET}@host/a.tar",
        f"s3://key:{SECRET}@bucket/a.tar::https://host/b.tar",
        SIGNED,
        f"https://host/a.tar?sig={SECRET}%3D&se=2026-01-01T00%3A00Z",
        f"https://host/a.tar?token={SECRET}",
        f"https://host/a.tar?access_token={SECRET}#x",
        f"https://host/a.tar#token={SECRET}",
        f"https://host/{{0..3}}.tar?Expires=1&Signature={SECRET}&Key-Pair-Id=K",
        f"https://host/a.tar?GoogleAccessId=a&X-Goog-Signature={SECRET}",
        f"see <https://host/a.tar?a=1&amp;sig={SECRET}>",
        f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://host/a.tar",
        f'pipe:curl --header "X-Api-Key: {SECRET}" https://host/a.tar',
        f"pipe:curl -H PRIVATE-TOKEN:{SECRET} https://host/a.tar",
        f"pipe:curl -u me:{SECRET} https://host/a.tar",
        f"pipe:curl --user=me:{SECRET} https://host/a.tar",
        f"pipe:wget --http-password {SECRET} https://host/a.tar",
        f"pipe:AWS_SECRET_ACCESS_KEY={SECRET} aws s3 cp s3://b/a.tar -",
        f"pipe:env HF_TOKEN='{SECRET}' fetch",
        f"ClientError: 403, url='https://host/a.tar?sig={SECRET}'",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    hidden = redact(text)
    assert SECRET not in hidden and "***" in hidden and redact(hidden) == hidden
    assert SECRET not in json.dumps(redact_all({"a": [text, {"b": text}]}))
    json.loads(redact(json.dumps({"a": text})))


@pytest.mark.parametrize("token", ["AKIA" + "A1" * 8, "hf_" + "aB3" * 10, "ghp_" + "aB3" * 10, "sk-" + "aB3" * 10])
def test_tokens_of_known_shape_are_hidden_anywhere(token: str) -> None:
    assert token not in redact(f"pipe:fetch {token} x.tar")


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a.tar?part=7&download=true",
        "/data/{00000..00099}.tar::s3://bucket/key/b.tar",
        "abfs://container@account.dfs.core.windows.net/a.tar",
        "model.text.eos_token_id=49407 mask.keep_ratio=0.5 run.seed=3",
        "Train Epoch: 0 [96/96 (100%)] Step: 1/5 Data (t): 0.012 LR: 0.000100",
        "batch.global_size: 4096 does not divide by 3 ranks; mail me@host",
        "a photo of a red boat, author: me; price $5 & more",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_the_rest_of_a_url_stays() -> None:
    assert redact(SIGNED).endswith("&part=7") and redact(SIGNED).startswith(
        "https://bucket.s3.amazonaws.com/a.tar?X-Amz"
    )
    both = redact(f"https://h/a.tar?sig={SECRET}::https://u:{SECRET}@h/b.tar")
    assert both == "https://h/a.tar?sig=***::https://***@h/b.tar"


# Everything a run writes


def test_no_file_of_a_run_holds_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"https://me:{SECRET}@host/a.tar?sig={SECRET}"
    monkeypatch.setattr("sys.argv", ["amclip", "train", f"data.train={spec}"])
    settings = config.load("aclip-tiny", [f"data.train={spec}", f"run.out={tmp_path}/run"])
    folder, attempt = open_folder(settings)
    write_verdict(folder, 2, 0, attempt, str(UserError(f"data.train: {spec} cannot be read")))
    append_line(folder / "incidents.jsonl", {"shard": spec, "cause": f"403, url={spec}"})
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert SECRET not in path.read_text() and path.stat().st_mode & 0o044 == 0o044, (
            path
        )  # a colleague's watch reads it
    assert SECRET not in describe_versions() and config.dump(settings) == config.dump(settings)
    again = config.load(str(folder / "config.yaml"))
    with pytest.raises(UserError, match="from a record, which leaves secrets out; give the whole URL again"):
        check_inputs(again.data, None)


def test_an_index_holds_no_secret_and_serves_any_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signed URL is another one every hour: the index and its fingerprint are those of the shard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reader, "FIRST_PAUSE_S", 0.001)
    with FaultyServer({}) as server:
        server.files = {f"a.tar?token={secret}": tar_of(samples(range(3))) for secret in (SECRET, "other")}
        urls = [f"{server.url}/a.tar?token={secret}" for secret in (SECRET, "other")]
        assert main(["data", "index", urls[0], "--out", "index"]) == 0
        index = Index("index")
        assert index.find(urls) == [0, 0] and default_folder((urls[0],)) == default_folder((urls[1],))
        assert build_index(urls[1:], tmp_path / "again", 1).fingerprint() == index.fingerprint()
        assert main(["data", "check", urls[0], "--workers", "1", "--json", "check.json"]) == 0
        assert (
            main(["data", "check", f"{server.url}/none.tar?token={SECRET}", "--workers", "1", "--json", "none.json"])
            == 2
        )
    printed = "".join(capsys.readouterr())
    assert SECRET not in printed + "".join(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*.*"))
    assert "token=***" in (tmp_path / "index" / "meta.json").read_text()


def test_only_submits_script_has_the_secret_and_it_is_the_users_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.train=https://me:{SECRET}@host/a.tar", f"run.out={tmp_path}/run"]
    assert main(["submit", "aclip-tiny", *words, "--dry-run", "--json", f"{tmp_path}/submit.json"]) == 0
    printed = "".join(capsys.readouterr())
    assert SECRET not in printed and "submit.sh (mode 0600)" in printed
    holders = [path.name for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
    assert holders == ["submit.sh"]
    assert (tmp_path / "run" / "slurm" / "submit.sh").stat().st_mode & 0o777 == 0o600
