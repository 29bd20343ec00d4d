"""The Hugging Face Hub as a folder: what is uploaded is copied into it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest


def copy_uploads(patch: pytest.MonkeyPatch, hub: Path) -> None:
    """Let the published methods of huggingface_hub copy what they upload to ``hub / "owner" / "name"``."""

    def upload_folder(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, **_):
        (hub / repo_id).mkdir(parents=True, exist_ok=True)
        shutil.copy(path_or_fileobj, hub / repo_id / path_in_repo)
        return f"https://hub/{repo_id}"

    def create_commit(self, repo_id, operations, **_):
        for one in operations:
            upload_file(self, repo_id=repo_id, path_or_fileobj=one.path_or_fileobj, path_in_repo=one.path_in_repo)

    made = lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)  # noqa: E731
    for method in (upload_folder, upload_file, create_commit):
        patch.setattr(f"huggingface_hub.HfApi.{method.__name__}", method)
    patch.setattr("huggingface_hub.HfApi.create_repo", made)
