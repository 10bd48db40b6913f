"""Names of models as open_clip writes them: `hf-hub:ORG/NAME[@REVISION]` and `local-dir:PATH`, next to plain paths.

A name of the hub is looked up by huggingface_hub, which keeps what it downloads and needs no network for what it has.
Only settings, texts and safetensors are downloaded: nothing that could run.
"""

import re
from pathlib import Path

from amclip_ds.errors import LocalSettingsError, in_one_line

HUB, LOCAL = "hf-hub:", "local-dir:"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[\w][\w./-]{0,99}", re.ASCII)
DOWNLOADED = ("*.json", "*.yaml", "*.safetensors", "*.txt", "*.onnx", "*.onnx.data", "README.md")


def is_hub_name(source: str) -> bool:
    """Whether a source names a model of the hub."""
    return source.startswith(HUB)


def local(source: str) -> Path:
    """Where a source is on this machine; a name of the hub is downloaded first. Raises LocalSettingsError."""
    if source.startswith(LOCAL):
        return Path(source.removeprefix(LOCAL)).expanduser()
    if not is_hub_name(source):
        return Path(source)
    name, _, revision = source.removeprefix(HUB).partition("@")
    if not NAME.fullmatch(name) or (revision and (not REVISION.fullmatch(revision) or ".." in revision)):
        raise LocalSettingsError(f"{source[:200]}: write it as {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION")
    return _download(source, name, revision or None)


def missing(source: str) -> str:
    """What to add to a message that there is nothing at a path which looks like a name of the hub."""
    return f"; a model of the hub is {HUB}{source}" if NAME.fullmatch(source) else ""


def _download(source: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # of the network, of the hub, of the disk
        at = f" --revision {revision}" if revision else ""
        offline = " and HF_HUB_OFFLINE keeps it from being downloaded" if constants.HF_HUB_OFFLINE else ""
        cause = "" if offline else f" ({type(error).__name__}: {in_one_line(error, 200)})"
        raise LocalSettingsError(
            f"{source}: not in {constants.HF_HUB_CACHE}{offline}{cause}; where there is a network:"
            f" hf download {name}{at}"
        ) from None
