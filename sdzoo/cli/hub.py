"""The command that publishes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from sdzoo.cli.parser import Commands


def add_commands(commands: Commands) -> None:
    """Add ``publish``."""
    example = (
        "sdzoo publish runs/first --repo ORG/sd_resnet20.digits --license apache-2.0 --dry-run\n"
        "  sdzoo publish runs/first --to zoo/sd_resnet20.digits --license apache-2.0"
    )
    added = commands.add("publish", _publish, "put a run on the Hub or into a folder, verified from there", example)
    added.add_argument("source", metavar="RUN", help="folder of a finished run, or a checkpoint")
    added.add_argument("--repo", metavar="ORG/NAME", help="repository on the Hub, made if it is not there")
    added.add_argument("--to", type=Path, metavar="DIR", help="a folder to make instead, of the same layout")
    added.add_argument("--license", required=True, help="of the weights, as the Hub calls it: apache-2.0, mit, ...")
    added.add_argument("--tag", default="v1.0", help="of this version; never moved (default: v1.0)")
    added.add_argument("--revision", default="main", metavar="BRANCH", help="what to commit to (default: main)")
    added.add_argument("--private", action="store_true", help="make the repository a private one")
    added.add_argument("--pr", action="store_true", help="open a pull request; the tag comes later")
    added.add_argument("--dry-run", action="store_true", help="build, check and show; write nothing, ask nobody")
    added.add_argument("--onnx", action="store_true", help="add a verified ONNX file")
    added.add_argument("--data", metavar="NAME", help="what the card calls the data set (default: as the run does)")
    added.add_argument("--no-metrics", action="store_true", help="publish without figures; the card says so")
    added.add_argument("--arch", help="name of the model in a checkpoint that does not say")


def _publish(arguments: argparse.Namespace) -> None:
    from sdzoo.hub.publish import publish

    names = ("repo", "license", "to", "tag", "revision", "private", "pr", "dry_run", "onnx", "no_metrics", "arch")
    given = {name: getattr(arguments, name) for name in names}
    print(f"publishing {arguments.source}", flush=True)
    done = publish(arguments.source, **given, data_name=arguments.data, progress=lambda text: print(text, flush=True))
    if arguments.dry_run:
        print(f"next: {_command(arguments, without='--dry-run')}")
    elif done.folder:
        print(f"done: {done.folder}\nnext: sdzoo verify {shlex.quote(f'local-dir:{done.folder}')}")
    elif done.tag is None:
        print(f"done: {done.pull_request or arguments.revision} of {arguments.repo}, commit {done.commit}")
        when = "next, once it is merged" if done.pull_request else "next"
        print(f"{when}: {_command(arguments, without='--pr')}    # adds the tag {arguments.tag}")
    else:
        print(f"done: {arguments.repo}, {done.tag} is commit {done.commit}")
        print(f"next: sdzoo verify hub:{arguments.repo}@{done.tag}")


def _command(arguments: argparse.Namespace, without: str) -> str:
    return shlex.join(["sdzoo", *(word for word in arguments.argv if word != without)])
