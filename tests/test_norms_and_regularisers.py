"""Other norms and other regularisers beside the gates: the loading rule, the fold and the step, for each pair."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nets import Net, close, evaluate, random_images
from timm.data.mixup import Mixup
from timm.layers import BlurPool2d, convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import sdzoo
from sdzoo.errors import InputError

ARCHS = {
    "sd_resnet20": (10, 16, {}),
    "sd_wide_resnet16_4": (10, 16, {}),
    "sd_resnext29_8x64": (10, 8, {}),
    "sd_resnet18": (10, 64, {"num_classes": 10}),
    "sd_resnet50": (10, 64, {"num_classes": 10}),
}
NARROW = ("sd_resnet20", "sd_wide_resnet16_4")  # 16 channels, of which timm's "groupnorm" cannot make 32 groups
NORMS = ["batchnorm2d", "groupnorm", "groupnorm1", "layernorm2d"]
REGULARISERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "dropout": {"drop_rate": 0.3},
    "drop-block": {"drop_block_rate": 0.1},
    "se": {"block_args": {"attn_layer": "se"}},
    "eca": {"block_args": {"attn_layer": "eca"}},
    "anti-alias": {"aa_layer": BlurPool2d},
}


def randomised(arch: str, seed: int = 0, **kwargs: Any) -> Net:
    """Return ``arch`` in evaluation, no affine, bias or statistic of which is 0 or 1."""
    torch.manual_seed(seed)
    model = timm.create_model(arch, **{**ARCHS[arch][2], **kwargs})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim != 1 or not tensor.is_floating_point():
                continue
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(0, 0.2, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def pairs() -> list[tuple[str, str, str]]:
    found = [(arch, norm, "nothing") for arch in ARCHS for norm in NORMS]
    found = [case for case in found if case[1] != "groupnorm" or case[0] not in NARROW]
    found += [("sd_resnet18", norm, regulariser) for norm in NORMS for regulariser in REGULARISERS]
    return list(dict.fromkeys(found))


@pytest.fixture(params=pairs(), ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], Tensor]:
    arch, norm, regulariser = request.param
    return arch, {"norm_layer": norm, **REGULARISERS[regulariser]}, random_images(4, ARCHS[arch][1]).double()


def test_the_loading_rule_rescales_whatever_ends_the_branch(pair: tuple[str, dict[str, Any], Tensor]) -> None:
    arch, kwargs, images = pair
    source = randomised(arch, **kwargs).double()
    other = timm.create_model(arch, schedule="uniform", drop_path_rate=0.3, **{**ARCHS[arch][2], **kwargs}).double()
    other.load_state_dict(source.state_dict())
    assert set(sdzoo.survival_probs(other)) == {0.7}
    expected = evaluate(source, images)
    close(expected, evaluate(other, images), tol=1e-10)
    sdzoo.set_survival(other, [1.0] * len(sdzoo.survival_probs(other)))
    close(expected, evaluate(other, images), tol=1e-10)
    probs_alone = timm.create_model(arch, schedule="constant_depth", **{**ARCHS[arch][2], **kwargs}).double()
    state = {name: value for name, value in source.state_dict().items() if "survival" not in name}
    probs_alone.load_state_dict(state)
    assert (evaluate(probs_alone, images) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_fold_keeps_the_function_and_names_what_it_keeps(pair: tuple[str, dict[str, Any], Tensor]) -> None:
    arch, kwargs, images = pair
    model = randomised(arch, **kwargs).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = sdzoo.fold(model)
    close(evaluate(model, images), evaluate(folded, images), tol=1e-10)
    kept = [module for module in folded.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    assert not [module for module in folded.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert bool(kept) == (kwargs["norm_layer"] != "batchnorm2d")
    assert [str(w.message) for w in caught] == (
        [f"fold keeps {len(kept)} {type(kept[0]).__name__}: only BatchNorm becomes part of a convolution"]
        if kept
        else []
    )
    with pytest.raises(InputError, match="no gates"):
        sdzoo.survival_probs(folded)


def test_a_step_with_gates_gives_every_parameter_a_gradient(pair: tuple[str, dict[str, Any], Tensor]) -> None:
    arch, kwargs, images = pair
    model = randomised(arch, drop_path_rate=0.8, **kwargs).double().train()
    torch.manual_seed(3)
    model(images).square().sum().backward()
    live = sdzoo.live_blocks(model)
    assert not all(live)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    blocks = [module for module in model.modules() if hasattr(module, "gate")]
    for block, is_live in zip([b for b in blocks if isinstance(b.gate, sdzoo.gate.Gate)], live, strict=True):
        assert bool(next(iter(block.conv2.parameters())).grad.any()) == is_live


@pytest.mark.parametrize("arch", ["sd_resnet20", "sd_resnet18"])
@pytest.mark.parametrize("kind", ["label smoothing", "mixup"])
def test_soft_labels_beside_the_gates(arch: str, kind: str) -> None:
    model, images = randomised(arch, drop_rate=0.2).train(), random_images(4, ARCHS[arch][1])
    labels = torch.tensor([0, 3, 5, 9])
    loss: Callable[[Tensor, Tensor], Tensor] = LabelSmoothingCrossEntropy(0.1)
    if kind == "mixup":
        images, labels = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)(images, labels)
        loss = SoftTargetCrossEntropy()
    bits = [index % 2 for index in range(len(sdzoo.survival_probs(model)))]
    with sdzoo.fixed_gates(model, bits):
        loss(model(images), labels).backward()
    blocks = [module for name, module in model.named_modules() if name.count(".") == 1 and name.startswith("layer")]
    for block, bit in zip(blocks, bits, strict=True):
        grads = [p.grad for name, p in block.named_parameters() if "downsample" not in name]
        assert any(bool(grad.any()) for grad in grads) == bool(bit)


@pytest.mark.parametrize("arch", ["sd_resnet20", "sd_resnet18", "sd_wide_resnet16_4", "sd_seresnet50"])
def test_sync_batchnorm_converts_loads_evaluates_and_folds(arch: str) -> None:
    kwargs: dict[str, Any] = {"num_classes": 10}
    size = 16 if arch in ("sd_resnet20", "sd_wide_resnet16_4") else 64
    torch.manual_seed(0)
    model: Net = timm.create_model(arch, **kwargs).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            cast(Tensor, module.running_mean).normal_(0, 0.2)
            cast(Tensor, module.running_var).uniform_(0.5, 2)
    images = random_images(2, size).double()
    expected = evaluate(model, images)
    state = model.state_dict()
    synced: Net = convert_sync_batchnorm(timm.create_model(arch, schedule="uniform", drop_path_rate=0.2, **kwargs))
    assert [m for m in synced.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert not [m for m in synced.modules() if isinstance(m, nn.BatchNorm2d)]
    synced = synced.double().eval()
    synced.load_state_dict(state)
    assert set(sdzoo.survival_probs(synced)) == {0.8}
    close(expected, evaluate(synced, images), tol=1e-10)
    folded = sdzoo.fold(synced)
    close(expected, evaluate(folded, images), tol=1e-10)
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def sync_step(rank: int, seeds: tuple[int, int], planned: bool, store: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model: Net = convert_sync_batchnorm(timm.create_model("sd_resnet20", schedule="uniform", drop_path_rate=0.5))
    model.train()
    torch.manual_seed(seeds[rank])
    try:
        if planned:
            bits = [1 - rank] * 9 if seeds[0] != seeds[1] else [0] * 9
            with sdzoo.fixed_gates(model, bits):
                model.layer1(torch.randn(2, 16, 8, 8))
        else:
            # SyncBatchNorm refuses tensors of a CPU in training, after the draws of its block have been compared
            for module in model.modules():
                if isinstance(module, nn.SyncBatchNorm):
                    module.eval()
            model.layer1(torch.randn(2, 16, 8, 8))
        results[rank] = "ran"
    except InputError as error:
        results[rank] = str(error)
    dist.destroy_process_group()


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_sync_batchnorm_wants_gates_shared_by_all_ranks(seeds: tuple[int, int], planned: bool, tmp_path: Any) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(sync_step, (seeds, planned, str(tmp_path / "store"), results), nprocs=2)  # type: ignore[attr-defined]
        said = [results[0], results[1]]
    if seeds[0] == seeds[1]:
        assert said == ["ran", "ran"]
    else:
        assert all("SyncBatchNorm needs gates shared by all ranks" in text for text in said)
