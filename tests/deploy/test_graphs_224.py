"""Nodes that only networks for larger pictures have (pooling, dilation, attention), against PyTorch, node for node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from nets import calibrated, close, evaluate, random_images
from samples import onnx_outputs
from torch import nn

from sdzoo.deploy.onnx_export import export_onnx
from sdzoo.deploy.onnx_graph import onnx_graph
from sdzoo.errors import InputError

SIZE = 65  # odd at every stage (33, 17, 9, 5, 3): what is padded, rounded up or counted shows
SMALL: dict[str, Any] = {
    "layers": (1, 2, 1, 1),
    "channels": (16, 32, 64, 128),
    "num_classes": 10,
    "pretrained_cfg_overlay": {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0},
}
# What the variant is, and a node that it must have, or must not ("no"), for it to have been tried.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "MaxPool"),
    "average pooling on the shortcut": ({"avg_down": True}, "AveragePool"),
    "stride 8": ({"output_stride": 8}, "dilated Conv"),
    "squeeze and excitation": ({"block_args": {"attn_layer": "se"}}, "Sigmoid"),
    "anti-aliasing": ({"aa_layer": nn.AvgPool2d}, "AveragePool"),
    "no pooling": ({"replace_stem_pool": True}, "no MaxPool"),
    "deep stem": ({"stem_type": "deep", "stem_width": 16}, "MaxPool"),
    "wide shortcuts": ({"down_kernel_size": 3}, "MaxPool"),
}


def kinds(path: Path) -> set[str]:
    """Return what nodes a file has; a convolution with dilation is named so."""
    dilated = {
        f"dilated {node.op_type}"
        for node in onnx.load(path).graph.node
        if any(a.name == "dilations" and max(a.ints) > 1 for a in node.attribute)
    }
    return dilated | {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("name", VARIANTS)
def test_graph_computes_what_pytorch_does(tmp_path: Path, name: str) -> None:
    options, node = VARIANTS[name]
    model = calibrated("sd_resnet50", images=random_images(4, SIZE), **SMALL, **options)
    export_onnx(model, tmp_path / "model.onnx")
    assert (node.removeprefix("no ") in kinds(tmp_path / "model.onnx")) is not node.startswith("no ")
    images = random_images(3, SIZE, seed=5)
    close(evaluate(model, images), torch.from_numpy(onnx_outputs(tmp_path / "model.onnx", images.numpy())), 1e-4)


@pytest.mark.parametrize("counted", [False, True])
def test_padding_that_an_average_counts_or_not(tmp_path: Path, counted: bool) -> None:
    pool = nn.Sequential(nn.AvgPool2d(3, 2, padding=1, count_include_pad=counted)).eval()
    onnx.save(onnx_graph(pool, (3, 9, 9), "features"), tmp_path / "pool.onnx")
    images = random_images(2, 9)
    close(pool(images), torch.from_numpy(onnx_outputs(tmp_path / "pool.onnx", images.numpy())), 1e-6)


def test_attention_without_onnx_counterpart_is_refused(tmp_path: Path) -> None:
    model = calibrated("sd_resnet50", images=random_images(4, SIZE), **SMALL, block_args={"attn_layer": "eca"})
    with pytest.raises(InputError, match="cannot be exported"):
        export_onnx(model, tmp_path / "model.onnx")
