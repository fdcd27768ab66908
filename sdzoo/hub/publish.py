"""Publishing a run or a checkpoint: what is asked is checked, the folder built and shown, and then sent or put."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdzoo.errors import InputError, shown
from sdzoo.hub.layout import SUMS, published_files, read_sums
from sdzoo.hub.publication import Details, check_loads, open_subject, write_folder
from sdzoo.hub.remote import client
from sdzoo.hub.upload import Target, upload

TAG, MAIN = "v1.0", "main"
WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Published:
    """Where a model is now.

    Attributes:
        folder: Which it was written to, or None.
        commit: Which holds it, or None.
        tag: Of that commit, None where there is none yet.
        pull_request: Which brings it, as ``refs/pr/N``, or None.
    """

    folder: Path | None = None
    commit: str | None = None
    tag: str | None = None
    pull_request: str | None = None


def publish(
    source: str | Path,
    repo: str | None = None,
    *,
    license: str,
    to: str | Path | None = None,
    tag: str = TAG,
    revision: str = MAIN,
    private: bool = False,
    pr: bool = False,
    dry_run: bool = False,
    onnx: bool = False,
    no_metrics: bool = False,
    arch: str | None = None,
    data_name: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publish a run or a checkpoint as ``repo`` on the Hub, or into the folder ``to``, and return where it is.

    What is published is built and loaded back first. On the Hub it becomes one commit, which gets its tag only after
    the sha256 of every file was compared there, and what was downloaded into an empty cache computed the same logits
    to the bit. Called again, it goes on from wherever it stopped, and changes nothing if it had not.

    Args:
        source: A run's folder, or a checkpoint.
        repo: ``ORG/NAME``, made if it is not there.
        license: Of the weights, as the Hub calls it.
        to: A folder, of the same layout, for ``local-dir:`` and :func:`sdzoo.load_hub`.
        tag: What this version is called, for good.
        revision: The branch that is committed to.
        private: Of a new repository.
        pr: Open a pull request, without a tag.
        dry_run: Build, check and show; write nothing and ask nobody.
        onnx: With a verified ONNX file.
        no_metrics: Without figures, which the card then says.
        arch: The model of a checkpoint that does not say.
        data_name: What the card calls the data set; default: as the run does.
        progress: Called with the plan, and with what is being done.

    Raises:
        InputError: if something given is wrong, the run is not whole or has no figures, or the tag is on other files.
        ParityError: if what was built, or what came back, is not the model.
        HubError: an OSError, if the Hub failed; this and the others say what is on the Hub then.
    """
    if (repo is None) == (to is None):
        raise InputError("name one place to publish to: --repo ORG/NAME or --to DIR")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise InputError(f'license is "{license}"; name it as the Hub does: apache-2.0, mit, cc-by-4.0, other, ...')
    if to is not None and (tag, revision, private, pr) != (TAG, MAIN, False, False):
        raise InputError("--tag, --revision, --private and --pr are for a repository, --repo, not for a folder, --to")
    if to is not None:
        _check_place(Path(to))
    target = _target(repo, revision, tag, private, pr) if repo is not None else None
    subject = open_subject(source, no_metrics, arch)
    name = target.repo.partition("/")[2] if target else Path(to or "").resolve().name
    if not name.isprintable():
        raise InputError(f"--to {name!r:.100}: the card cannot be called so")
    details = Details(name, license, f"hf-hub:{repo}@{tag}" if repo else None, data_name, onnx)
    with tempfile.TemporaryDirectory(prefix="sdzoo-publish-") as scratch:
        folder = Path(to) if to is not None and not dry_run else Path(scratch, name)
        write_folder(subject, folder, details, progress)
        progress(_plan(folder, target, to, license))
        if cut := sorted({key for _, key in (subject.measured.cut if subject.measured else ())} - {"data_dir"}):
            progress(f"cut from the recipe, being a path or nothing that is known to be public: {', '.join(cut)}")
        if subject.measured and not subject.measured.recipe.dataset and data_name is None:
            called = shown(subject.measured.data, 100)
            progress(f'the card calls the data set "{called}", after its folder; to call it otherwise: --data NAME')
        if dry_run:
            return Published()
        if target is None:
            return Published(folder=folder)
        commit = upload(folder, target, client(writes=True), lambda back: check_loads(back, subject.model), progress)
    return Published(None, commit.oid, None if pr else tag, commit.pull_request)


def _check_place(folder: Path) -> None:
    """Refuse, before anything is built, what would be refused afterwards: a dry run says so too."""
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder.absolute().parent} is not a folder; create it first")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if there and (others := sorted(there - published_files(folder))):
        raise InputError(f"{folder} holds other things: {', '.join(others[:10])}; name another folder")


def _target(repo: str, revision: str, tag: str, private: bool, pr: bool) -> Target:
    if not re.fullmatch(rf"{WORD}/{WORD}", repo) or len(repo) > 96 or re.search(r"--|\.\.|[.-](/|$)|\.git$", repo):
        raise InputError(f'"{repo}" is no repository; it is ORG/NAME, of letters, digits and single . _ -, at most 96')
    for what, word in (("tag", tag), ("revision", revision)):
        if not re.fullmatch(WORD, word) or re.search(r"\.\.|\.lock$|\.$", word) or re.fullmatch(r"[0-9a-f]{40}", word):
            raise InputError(f'{what} "{word}" is not a name of letters, digits and . _ -')
    if tag in (MAIN, revision):
        raise InputError(f'tag "{tag}" is the name of a branch: a tag stays where it is; name it by a version')
    if pr and revision != MAIN:
        raise InputError(f"a pull request goes to {MAIN}; --revision {revision} is for a commit of one's own")
    return Target(repo, revision, tag, private, pr)


def _plan(folder: Path, target: Target | None, to: str | Path | None, license: str) -> str:
    sums = read_sums((folder / SUMS).read_text(encoding="utf-8"))
    place = str(to) if target is None else f"{target.repo}, branch {target.revision}"
    if target is not None:
        place += " by a pull request" if target.pr else f", then the tag {target.tag}"
        place += ", private if it is new" if target.private else ", public if it is new"
    lines = [f"{(folder / name).stat().st_size:>12,} {digest[:12]}  {name}" for name, digest in sums.items()]
    return "\n".join([f"to {place}, license {license}:", *lines])
