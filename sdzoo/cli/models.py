"""The commands that say what there is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdzoo.cli.parser import Commands

if TYPE_CHECKING:
    from sdzoo.zoo import Summary


def add_commands(commands: Commands) -> None:
    """Add ``list`` and ``info``."""
    example = "sdzoo list 'sd_resnet1*' '*110*'"
    added = commands.add("list", _list, "list the models, what they cost, and which have weights", example)
    added.add_argument("pattern", nargs="*", help="only names that match one of these wildcards (default: all)")
    added.add_argument("--pretrained", action="store_true", help="only those with weights, as model.tag")

    added = commands.add("info", _info, "say what a model is made of", "sdzoo info sd_resnet110")
    added.add_argument("model", help="name of a model, or what is published: hub:ORG/NAME")


def _list(arguments: argparse.Namespace) -> None:
    from sdzoo.registry import models
    from sdzoo.zoo import summarise

    names = models(arguments.pattern, arguments.pretrained)
    width = max(map(len, names)) + 1
    columns = (("pixels", 7), ("parameters", 13), ("MACs", 11), ("training", 11), ("layers", 8), ("blocks", 8))
    print(f"{'model':<{width}}" + "".join(f"{name:>{room}}" for name, room in columns) + f"{'live':>8}  weights")
    for name in names:
        s = summarise(name)
        print(
            f"{name:<{width}}{s.input_size[-1]:>7}{s.parameters:>13,}{s.macs / 1e6:>9,.0f} M"
            f"{s.training_macs / 1e6:>9,.0f} M{s.layers:>8}{s.blocks:>8}{s.expected_live_blocks:>8.2f}  {_weights(s)}",
            flush=True,
        )
    print(
        "\nMACs: of one image in evaluation; training: of its forward in training, on average, at p_L = 0.5;"
        "\nlive: blocks that this computes, on average; layers: convolutions and linear layers, those of shortcuts too."
        f"\nnext: sdzoo info {names[0]}"
    )


def _weights(s: Summary) -> str:
    """Return which weights ``s`` has, in a few words."""
    if "." in s.name:
        return "ship with sdzoo" if s.name in s.bundled else "on the Hub"
    on_the_hub = len(s.weights) - len(s.bundled)
    words = [name.partition(".")[2] for name in s.bundled] + [f"{on_the_hub} on the Hub"] * (on_the_hub > 0)
    return ", ".join(words) or "-"


def _info(arguments: argparse.Namespace) -> None:
    from sdzoo import weights
    from sdzoo.hub.source import FOLDER, HUB
    from sdzoo.plots import survival_chart
    from sdzoo.survival import survival_probs
    from sdzoo.zoo import open_model, summarise

    def survival(probs: Sequence[float], source: str) -> str:
        said = f"p_1 = {probs[0]:.6f} to p_L = {probs[-1]:.6f}, mean {sum(probs) / len(probs):.6f}, {source}"
        return "\n".join([said, *survival_chart(probs, ascii_only=not _takes("▁█┤─"))])

    s = summarise(arguments.model)
    published = s.name.startswith((HUB, FOLDER))
    rows = {
        "model": s.name,
        "input": " x ".join(map(str, s.input_size)),
        "parameters": f"{s.parameters:,}",
        "MACs": f"{s.macs:,} for one image in evaluation",
        "in training": f"{s.training_macs:,.0f} on average ({s.training_macs / s.macs:.1%}): "
        "a dropped branch costs nothing",
        "layers": f"{s.layers}",
        "blocks": f"{s.blocks}, of which {s.expected_live_blocks:.2f} are computed in a training step on average",
        "survival": survival(s.survival_probs, "in the weights" if published else "linear decay (the default)"),
        "weights": "as they are there" if published else ", ".join(s.bundled) or "none ship with sdzoo",
    }
    for name, value in rows.items():
        print(f"{name:<12}{value}")
    if on_the_hub := [name.partition(".")[2] for name in s.weights if name not in s.bundled]:
        print(f"on the Hub  {', '.join(on_the_hub)}")
    for name in s.bundled:
        facts = weights.card(name)
        print(
            f"\n{name}: trained on {facts['data']}, {facts['epochs']} epochs, top-1 {facts['test_top1_percent']:.2f} % "
            f"on its test split\nsurvival    {survival(survival_probs(open_model(name)), 'in the weights')}"
            f"\n{weights.path(name)}\nnext: sdzoo predict IMAGE --model {name}"
        )


def _takes(text: str) -> bool:
    """Return whether standard output's encoding has all of ``text``."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
