"""`amclip export --push ORG/NAME`: the proved folder goes to the hub, or the command that does it is printed.

Nothing is sent where HF_HUB_OFFLINE says so or where nobody is logged in; the folder is then ready as it is.
With --private nothing goes to a repository that others can read.
"""

from pathlib import Path

from amclip_ds import hub
from amclip_ds.errors import AmclipError, UserError, in_one_line

FORMATS = ("hf", "open_clip")


def check(name: str, fmt: str) -> None:
    """Before the export is made. Raises UserError."""
    if fmt not in FORMATS:
        raise UserError(
            f"--push: models of the hub are loaded by transformers (--format hf) or open_clip, not by {fmt}"
        )
    if not hub.NAME.fullmatch(name):
        raise UserError(f"--push {name[:200]}: write it as ORG/NAME")


def push(folder: Path, name: str, is_private: bool) -> str:
    """Uploads; returns what to say. Raises AmclipError where the hub does not take it, which leaves the folder."""
    from huggingface_hub import HfApi, constants, get_token

    command = f"hf upload {name} {folder}{' --private' if is_private else ''}"
    if constants.HF_HUB_OFFLINE or get_token() is None:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "nobody is logged in here (hf auth login)"
        return f"not pushed: {why}; the folder is ready: {command}"
    try:
        api = HfApi()
        api.create_repo(name, private=is_private, exist_ok=True)
        if is_private and not api.model_info(name).private:  # one that is there already stays what it is
            raise UserError(f"{name} is there already, and is public: make it private there, or take another name")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Weights exported by amclip_ds")
    except UserError as error:
        raise UserError(f"--private: {error}; nothing was sent, and the folder is ready: {folder}") from None
    except Exception as error:  # of the network, of the hub, of one's rights there
        cause = f"{type(error).__name__}: {in_one_line(error, 200)}"
        raise AmclipError(f"--push {name}: {cause}; the folder is ready: {command}") from None
    return f"pushed: {hub.HUB}{name}"
