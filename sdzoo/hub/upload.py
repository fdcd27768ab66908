"""From a folder to a tagged commit: one commit, compared with the folder from the other side before it gets its tag.

Whatever fails, the error says what is on the Hub now. What is there already is not sent again, so that the same call
goes on from anywhere.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.hf_api import RepoFile

from sdzoo import __version__
from sdzoo.digest import file_sha256
from sdzoo.errors import InputError, ParityError, shown_names
from sdzoo.hub.cache import COMMIT, download
from sdzoo.hub.layout import OF_THE_HUB, OURS
from sdzoo.hub.remote import HubError, one_line, printable_warnings

AGAIN = "run the same command again: it goes on from there"


@dataclass(frozen=True)
class Target:
    """Where a folder goes: repository, branch, the tag of this version; whether by a pull request, which has no tag."""

    repo: str
    revision: str
    tag: str
    private: bool = False
    pr: bool = False


@dataclass(frozen=True)
class Commit:
    """A commit that holds the folder and, if one was opened for it, its pull request, as ``refs/pr/N``."""

    oid: str
    pull_request: str | None = None


def upload(
    folder: Path, target: Target, api: HfApi, check: Callable[[Path], None], progress: Callable[[str], None]
) -> Commit:
    """Return the commit that holds ``folder`` and, but for a pull request, now has its tag.

    Args:
        folder: Flat, with its sums.
        target: Where it goes.
        api: The client.
        check: Raises ParityError if the folder that it is given, one that was downloaded, is not what was meant.
        progress: Called with what is being done.

    Raises:
        InputError: if the tag is on other files, the repository holds others, or as the Hub refuses.
        ParityError: if what came back is not what was sent.
        HubError: if the Hub failed.
    """
    repo = target.repo
    with _standing(lambda error: _before(error, folder, target, api)):
        commit = _there_already(folder, target, api, progress) or _commit(folder, target, api, progress)
    with _standing(lambda _: _after(commit, target, api)):
        progress(f"comparing commit {commit.oid}")
        _compare(folder, repo, commit.oid, api)
        _compare_downloaded(folder, repo, commit.oid, api, check)
        if not target.pr:
            _tag(target, commit.oid, api)
    return commit


def _there_already(folder: Path, target: Target, api: HfApi, progress: Callable[[str], None]) -> Commit | None:
    """Return the commit that holds ``folder`` already; None if there is none. The repository is made if need be."""
    repo = target.repo
    with one_line(repo, api):
        if target.revision != constants.DEFAULT_REVISION and not api.repo_exists(repo):
            raise InputError(f"{repo} is not there, or not for you; a new one has no branch {target.revision}")
        api.create_repo(repo, private=target.private, exist_ok=True)
        if target.private and not api.model_info(repo).private:
            raise InputError(f"{repo} is there already and public: --private is for a new repository")
    found, ref = _find(folder, target, api)
    if found:
        progress(f"{ref} of {repo} holds these files already")
    return found


def _refs(repo: str, api: HfApi) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Return the commits of the tags, the branches and the pull requests of ``repo``, the last as ``refs/pr/N``."""
    with one_line(repo, api):
        refs = api.list_repo_refs(repo, include_pull_requests=True)
        tags = {tag.name: _commit_id(tag.target_commit) for tag in refs.tags}
        branches = {branch.name: _commit_id(branch.target_commit) for branch in refs.branches}
        requests = {_pull_request(one.ref): _commit_id(one.target_commit) for one in refs.pull_requests or []}
    return tags, branches, requests


def _commit_id(said: str | None) -> str:
    if not COMMIT.fullmatch(said or ""):
        raise ValueError(f'"{said}" is no commit')
    return str(said)


def _pull_request(said: str | None) -> str:
    if not re.fullmatch(r"refs/pr/[0-9]+", said or ""):
        raise ValueError(f'"{said}" is no pull request')
    return str(said)


def _find(folder: Path, target: Target, api: HfApi) -> tuple[Commit | None, str]:
    """Return the commit that holds ``folder``, and what points to it: the tag, the branch, or a pull request.

    The real Hub may list closed pull requests too, which then count as open ones; that is not tested.
    """
    repo = target.repo
    tags, branches, requests = _refs(repo, api)
    if target.revision not in branches:
        raise InputError(f"{repo} has no branch {target.revision}; it has: {shown_names(branches)}")
    head = branches[target.revision]
    if target.tag in tags:
        if _differing(folder, _tree(repo, tags[target.tag], api)):
            raise _taken(target, tags[target.tag])
        elsewhere = f" (not the last commit of {target.revision}, which is left as it is)"
        return Commit(tags[target.tag]), target.tag + elsewhere * (head != tags[target.tag])
    if not _differing(folder, _tree(repo, head, api)):
        return Commit(head), target.revision
    for ref, oid in reversed(requests.items()) if target.pr else ():
        if not _differing(folder, _tree(repo, oid, api)):
            return Commit(oid, ref), ref
    return None, ""


def _commit(folder: Path, target: Target, api: HfApi, progress: Callable[[str], None]) -> Commit:
    repo = target.repo
    with one_line(f"{repo}@{target.revision}", api):
        parent = _commit_id(api.model_info(repo, revision=target.revision).sha)
    there = _tree(repo, parent, api)
    names = sorted(file.name for file in folder.iterdir())
    others = sorted(there.keys() - {*names, OF_THE_HUB})
    if foreign := [name for name in others if name not in OURS]:
        raise InputError(
            f"{repo} holds other files: {shown_names(foreign)}; what is published stands alone, so delete them or "
            "name another repository"
        )
    changes = [CommitOperationAdd(name, folder / name) for name in names]
    deleted = [CommitOperationDelete(name) for name in others]
    changed = {"replacing": [name for name in names if name in there], "removing": others}
    said = "".join(f", {how} {', '.join(found)}" for how, found in changed.items() if found)
    progress(f"committing {len(names)} files to {target.revision} of {repo}{said}")
    with one_line(repo, api), printable_warnings():
        made = api.create_commit(
            repo,
            [*changes, *deleted],
            commit_message=f"Published with sdzoo {__version__}",
            revision=target.revision,
            parent_commit=parent,
            create_pr=target.pr,
        )
        return Commit(_commit_id(made.oid), _pull_request(made.pr_revision) if target.pr else None)


def _compare(folder: Path, repo: str, oid: str, api: HfApi) -> None:
    if differing := _differing(folder, _tree(repo, oid, api)):
        raise ParityError(f"{repo} does not hold what was sent: {shown_names(differing)}")


def _compare_downloaded(folder: Path, repo: str, oid: str, api: HfApi, check: Callable[[Path], None]) -> None:
    """Download into an empty cache, and compare byte for byte and by what it computes."""
    names = sorted(file.name for file in folder.iterdir())
    with tempfile.TemporaryDirectory() as cache:
        size = {name: (folder / name).stat().st_size for name in names}
        back = [download(api, Path(cache), repo, oid, name, size[name]) for name in names]
        differing = [path.name for path in back if file_sha256(path) != file_sha256(folder / path.name)]
        if differing:
            raise ParityError(f"what came back from {repo} is not what was sent: {', '.join(differing)}")
        try:
            check(back[0].parent)
        except ParityError:
            raise
        except RuntimeError as error:
            raise ParityError(f"what came back from {repo} does not load: {' '.join(str(error).split())}") from None


def _tag(target: Target, oid: str, api: HfApi) -> None:
    try:
        with one_line(target.repo, api):
            api.create_tag(target.repo, tag=target.tag, revision=oid)
    except HubError as error:
        if error.status != 409:
            raise
        with one_line(target.repo, api):
            tags = _refs(target.repo, api)[0]
        if tags.get(target.tag) != oid:
            raise _taken(target, tags.get(target.tag)) from None


def _taken(target: Target, oid: str | None) -> InputError:
    return InputError(
        f"{target.repo} has the tag {target.tag} already, on commit {oid}, which is another one: a tag is never moved; "
        "name another with --tag"
    )


def _tree(repo: str, oid: str, api: HfApi) -> dict[str, RepoFile]:
    with one_line(f"{repo}@{oid}", api):
        entries = list(api.list_repo_tree(repo, recursive=True, revision=oid))
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differing(folder: Path, there: dict[str, RepoFile]) -> list[str]:
    """Return the files that are not the same in ``folder`` and ``there``."""
    here = {file.name: file for file in folder.iterdir()}
    foreign = there.keys() - here.keys() - {OF_THE_HUB}
    return sorted(foreign | {name for name, file in here.items() if not _same(file, there.get(name))})


def _same(file: Path, entry: RepoFile | None) -> bool:
    """Return whether the Hub holds ``file``: of a large one it knows the sha256, of others git's digest."""
    if entry is None:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == file_sha256(file)
    content = file.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def _standing(what_is_there: Callable[[BaseException], str]) -> Iterator[None]:
    """Let every failure say what is on the Hub now."""
    try:
        yield
    except HubError as error:
        raise HubError(f"{error}; {what_is_there(error)}; {AGAIN}", error.status) from None
    except InputError as error:
        raise InputError(f"{error}; {what_is_there(error)}") from None
    except (ParityError, OSError) as error:
        kind = ParityError if isinstance(error, ParityError) else OSError
        raise kind(f"{error}; {what_is_there(error)}; {AGAIN}") from None
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; {what_is_there(error)}; {AGAIN}") from None
    except Exception as error:  # a fault of this program's: its traceback is wanted too
        raise RuntimeError(f"{error!r}; {what_is_there(error)}") from error


def _before(error: BaseException, folder: Path, target: Target, api: HfApi) -> str:
    """Return what is there after ``error``, if need be by asking: the answer to a commit may have been lost."""
    refused = isinstance(error, HubError) and error.status is not None and error.status < 500
    if refused or isinstance(error, InputError):
        return f"nothing was committed to {target.repo}{_if_empty(target, api)}"
    try:
        commit, _ = _find(folder, target, api)
    except (InputError, HubError):
        return f"{target.repo} could not be asked whether it holds the commit"
    return _after(commit, target, api) if commit else f"{target.repo} holds no such commit{_if_empty(target, api)}"


def _if_empty(target: Target, api: HfApi) -> str:
    """Return that a new repository is left without files, if it may be so, and where to be rid of it."""
    try:
        there = _tree(target.repo, target.revision, api).keys() - {OF_THE_HUB}
    except (InputError, HubError):
        return ""
    if there or target.revision != constants.DEFAULT_REVISION:
        return ""
    return f", whose {target.revision} is empty (if it is new and not wanted: {api.endpoint}/{target.repo}/settings)"


def _after(commit: Commit, target: Target, api: HfApi) -> str:
    """Return what points to ``commit`` now, which others may have changed since, and the answer to a tag been lost."""
    where = f"{commit.pull_request or target.revision} of {target.repo}"
    try:
        tags, branches, requests = _refs(target.repo, api)
    except (InputError, HubError):
        return f"commit {commit.oid} was on {where}, which could not be asked whether it has the tag {target.tag}"
    last = (branches | requests).get(commit.pull_request or target.revision) == commit.oid
    tagged = tags.get(target.tag) == commit.oid
    on, has = "on" if last else "not, or no longer, the last of", "with" if tagged else "without"
    return f"commit {commit.oid} is {on} {where}, {has} the tag {target.tag}"
