"""Uploads a saved drafter to the Hub, in one commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard

UPLOAD_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)
# Of an earlier upload in one file or in shards; transformers would load a single file rather than newer shards.
_STALE = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_IGNORED = ["__pycache__/*", "**/__pycache__/*", "*.pyc", ".git/*", "checkpoints/*"]


def upload_repo(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    keep_card: bool = False,
) -> str:
    """Upload ``folder`` as the Hub repo ``repo_id``.

    Args:
        folder: what ``save_pretrained`` wrote.
        repo_id: ``organisation/name``, or a name in your own namespace; made if absent.
        commit_message: of the commit; by default "Upload a Falcon drafter".
        commit_description: its long text.
        private: whether a new repo is private; the Hub's default by default.
        token: of the Hub; the stored one by default.
        revision: branch to commit to, made if absent; the main branch by default.
        create_pr: open a pull request instead.
        tags: further tags for the card.
        keep_card: leave a README.md that the repo has already as it is (but for ``tags``).

    Returns:
        The commit's or pull request's address.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    ignored = list(_IGNORED)
    branch = None if create_pr else revision
    kept = keep_card and api.file_exists(repo_id, "README.md", revision=branch)
    if kept and not tags:
        ignored.append("README.md")
    elif tags:
        own = api.hf_hub_download(repo_id, "README.md", revision=branch) if kept else folder / "README.md"
        card = ModelCard.load(own)
        card.data.tags = [*(card.data.tags or []), *(tag for tag in tags if tag not in (card.data.tags or []))]
        card.save(folder / "README.md")
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload a Falcon drafter",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=ignored,
        delete_patterns=_STALE,
    )
    return str(commit.pr_url if create_pr else commit.commit_url)
