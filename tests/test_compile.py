"""torch.compile of whole models and by blocks: what is computed, how often it is compiled, and that nothing falls back.

A backend that counts shows it: torch's own answer to too many compilations is to stop compiling in silence.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import Net, calibrated, close, evaluate, random_images
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import sdzoo
from sdzoo.errors import InputError


class Counting:
    """The eager backend; counts the graphs that it was given and the calls of what it returned."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*inputs: Any) -> Any:
            self.calls += 1
            return graph.forward(*inputs)

        return run

    def taken(self) -> tuple[int, int]:
        """Return graphs and calls since the last time."""
        found = self.graphs, self.calls
        self.graphs = self.calls = 0
        return found


# torch looks for the gradient of every tensor that a graph takes in, and warns of its own doing
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # torch 2.6, of its own doing
]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep it all
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def backend() -> Counting:
    return Counting()


def vit(mode: str = "batch") -> Net:
    torch.manual_seed(0)
    stock = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
    return sdzoo.add_stochastic_depth(stock, mode=mode).eval()


def make(name: str, **kwargs: Any) -> Net:
    if name == "vit_tiny":
        return vit(**kwargs)
    return calibrated(name, images=random_images(8, side(name)), **kwargs)


def side(name: str) -> int:
    return 64 if name in ("sd_resnet18", "sd_resnet50", "sd_seresnet50", "vit_tiny") else 16


# name: gates, distinct shapes of blocks (of a transformer: its two branches)
BY_BLOCKS = {
    "sd_resnet56": (27, 5),
    "sd_resnet50": (16, 8),
    "sd_resnetv2_164": (54, 6),
    "vit_tiny": (24, 2),
}
WHOLE = ("sd_resnet20", "sd_wide_resnet16_4", "vit_tiny")
MORE = ("sd_resnet18", "sd_seresnet50", "sd_resnetv2_164", "sd_resnext29_8x64")


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def step(model: Net, images: Tensor, seed: int) -> list[Tensor]:
    """Return logits and gradients of one training step with the draws of ``seed``."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(images)
    F.cross_entropy(out, torch.arange(len(images))).backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


# --- by blocks


@pytest.mark.parametrize("name", ["sd_resnet56", "sd_resnet50", "vit_tiny", *slow("sd_resnetv2_164")])
def test_blocks_of_one_shape_share_a_compilation_and_none_falls_back(name: str, backend: Counting) -> None:
    gates, shapes = BY_BLOCKS[name]
    model, images = make(name), random_images(2, side(name))
    twin, keys = copy.deepcopy(model).train(), list(model.state_dict())
    assert sdzoo.compile_blocks(model, backend=backend) is None
    assert list(model.state_dict()) == keys
    model.train()
    live, draws = 0, set()
    for seed in range(8):
        for compiled, plain in zip(step(model, images, seed), step(twin, images, seed), strict=True):
            assert torch.equal(compiled, plain)
        assert sdzoo.live_blocks(model) == sdzoo.live_blocks(twin)
        live += sum(sdzoo.live_blocks(model))
        draws.add(tuple(sdzoo.live_blocks(model)))
    assert len(draws) == 8 and live < 8 * gates
    assert backend.taken() == (shapes, live)  # a branch that was computed is one call of one graph
    with torch.no_grad():
        assert torch.equal(model.eval()(images), twin.eval()(images))
    assert backend.taken() == (shapes, gates)
    live = 0
    for seed in range(3):
        step(model.train(), images, seed)
        live += sum(sdzoo.live_blocks(model))
        evaluate(model, images)
    assert backend.taken() == (0, live + 3 * gates)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["sd_resnet20", "vit_tiny", *slow("sd_wide_resnet16_4")])
def test_other_batches_and_sizes_compile_again_but_never_fall_back(name: str, backend: Counting) -> None:
    model = make(name).train()
    sdzoo.compile_blocks(model, backend=backend)
    sides = (64,) if name == "vit_tiny" else (16, 8, 12)
    for count in (2, 3, 5, 4):
        for size in sides:
            step(model, random_images(count, size), seed=count)
            assert backend.calls == sum(sdzoo.live_blocks(model))
            backend.calls = 0
            with torch.no_grad():
                model.eval()(random_images(count, size))
            assert backend.calls == len(sdzoo.survival_probs(model))
            backend.calls = 0
            model.train()


def test_a_skipped_block_calls_nothing_compiled(backend: Counting) -> None:
    model = make("sd_resnet20").train()
    sdzoo.compile_blocks(model, backend=backend)
    for bits in ([0] * 9, [0, 1, 0, 0, 1, 0, 0, 0, 1], [1] * 9):
        with sdzoo.fixed_gates(model, bits):
            step(model, random_images(2, 16), seed=0)
        assert backend.taken()[1] == sum(bits)


def test_blocks_by_aot_autograd_compute_the_same() -> None:
    model, images = make("sd_resnet20"), random_images(4, 16)
    twin = copy.deepcopy(model).train()
    sdzoo.compile_blocks(model, backend="aot_eager")
    model.train()
    for seed in range(4):
        for compiled, plain in zip(step(model, images, seed), step(twin, images, seed), strict=True):
            close(plain, compiled, tol=1e-5)
    close(evaluate(twin, images), evaluate(model, images), tol=1e-5)


def test_blocks_with_masks_per_sample_are_compiled_and_draw(backend: Counting) -> None:
    model, images = make("sd_resnet20", mode="sample"), random_images(4, 16)
    twin = copy.deepcopy(model).train()
    sdzoo.compile_blocks(model, backend=backend)
    outs = []
    for seed in range(4):
        torch.manual_seed(seed)
        outs.append(model.train()(images))
        torch.manual_seed(seed)
        close(twin(images), outs[-1], tol=1e-6)
        assert backend.taken()[1] == 9
    assert not torch.equal(outs[0], outs[1])


def test_a_warm_up_of_the_draws_compiles_nothing_again(backend: Counting) -> None:
    model, images = make("sd_resnet20").train(), random_images(4, 16)
    sdzoo.compile_blocks(model, backend=backend)
    with sdzoo.fixed_gates(model, [1] * 9):
        step(model, images, seed=0)
    assert backend.taken() == (5, 9)
    live = 0
    for epoch in range(12):
        sdzoo.set_draw_probs(model, [1 - epoch / 24] * 9)
        step(model, images, epoch)
        live += sum(sdzoo.live_blocks(model))
    assert backend.taken() == (0, live)


def test_compiled_blocks_follow_their_weights_and_probabilities(backend: Counting) -> None:
    model, images = make("sd_resnet20"), random_images(4, 16)
    other = calibrated("sd_resnet20", seed=3, images=random_images(8, 16), drop_path_rate=0.3)
    sdzoo.compile_blocks(model, backend=backend)
    evaluate(model, images)
    model.load_state_dict(other.state_dict())
    close(evaluate(other, images), evaluate(model, images), tol=1e-6)
    sdzoo.set_survival(model, [0.95] * 9)
    close(evaluate(other, images), evaluate(model, images), tol=1e-5)
    with torch.no_grad(), sdzoo.fixed_gates(model.train(), [1] * 9), sdzoo.fixed_gates(other.train(), [1] * 9):
        assert (model(images) - other(images)).abs().max() > 1e-3
    again = calibrated("sd_resnet20", seed=4, images=random_images(8, 16))
    model.load_state_dict(copy.deepcopy(again.state_dict()), assign=True)
    close(evaluate(again, images), evaluate(model.eval(), images), tol=1e-5)
    backend.taken()
    close(evaluate(again, images), evaluate(model.double(), images.double()).float(), tol=1e-5)
    assert backend.taken()[1] == 9


def pickled(model: Net) -> Net:
    return pickle.loads(pickle.dumps(model))


def saved(model: Net) -> Net:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["sd_resnet20", "vit_tiny"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(
    copied: Callable[[Net], Net], name: str, backend: Counting
) -> None:
    model, images = make(name), random_images(2, side(name))
    sdzoo.compile_blocks(model, backend=backend)
    expected = evaluate(model, images)
    other = copied(model)
    assert torch.equal(evaluate(other, images), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    halved = evaluate(other, images)
    assert (halved - expected).abs().max() > 1e-3
    assert torch.equal(evaluate(model, images), expected)
    backend.taken()
    sdzoo.compile_blocks(other, backend=backend)
    assert torch.equal(evaluate(other, images), halved)
    assert backend.taken() == (0, len(sdzoo.survival_probs(other)))  # what was compiled serves the copy too


def test_an_average_of_a_compiled_model_follows_it(backend: Counting) -> None:
    model, images = make("sd_resnet20"), random_images(4, 16)
    sdzoo.compile_blocks(model, backend=backend)
    ema = ModelEmaV3(model, decay=0.5)
    step(model.train(), images, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    for _ in range(40):
        ema.update(model)
    close(evaluate(model, images), evaluate(ema.module, images), tol=1e-5)


def test_a_compiled_model_folds_and_returns_to_timm(backend: Counting) -> None:
    model, images = make("sd_resnet20"), random_images(4, 16)
    sdzoo.compile_blocks(model, backend=backend)
    expected = evaluate(model, images)
    close(expected, evaluate(sdzoo.fold(model), images), tol=1e-4)
    close(expected, evaluate(reparameterize_model(model), images), tol=1e-4)
    assert torch.equal(evaluate(model, images), expected)
    big, images = make("sd_resnet18"), random_images(2, 64)
    sdzoo.compile_blocks(big, backend=backend)
    expected = evaluate(big, images)
    backend.taken()
    close(expected, evaluate(sdzoo.to_timm(big), images), tol=1e-5)
    assert backend.taken() == (0, 0)


def test_gradient_checkpointing_recomputes_compiled_blocks_under_the_same_gates(backend: Counting) -> None:
    model, images = make("sd_resnet20"), random_images(4, 16)
    twin = copy.deepcopy(model).train()
    sdzoo.compile_blocks(model, backend=backend)
    model.train().set_grad_checkpointing()
    for seed in range(4):
        for compiled, plain in zip(step(model, images, seed), step(twin, images, seed), strict=True):
            close(plain, compiled, tol=1e-6)
        assert backend.taken()[1] == 2 * sum(sdzoo.live_blocks(twin))


def test_compiling_twice_replaces_the_first() -> None:
    model, images = make("sd_resnet20"), random_images(2, 16)
    first, second = Counting(), Counting()
    sdzoo.compile_blocks(model, backend=first)
    sdzoo.compile_blocks(model, backend=second)
    evaluate(model, images)
    assert (first.taken(), second.taken()) == ((0, 0), (5, 9))


def test_what_cannot_be_compiled_is_refused() -> None:
    for model in (timm.create_model("resnet18"), sdzoo.fold(make("sd_resnet20"))):
        with pytest.raises(InputError, match="has no gates"):
            sdzoo.compile_blocks(model)
    with pytest.raises(TypeError, match="bakend"):
        sdzoo.compile_blocks(make("sd_resnet20"), bakend="eager")
    with pytest.raises(Exception, match="egaer"):
        sdzoo.compile_blocks(make("sd_resnet20"), backend="egaer")


# --- whole models


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_in_evaluation_is_one_graph(name: str, backend: Counting) -> None:
    check_whole(name, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in timm.list_models("sd_*") if n not in (*WHOLE, "sd_resnet1202")])
def test_every_model_in_evaluation_is_one_graph(name: str, backend: Counting) -> None:
    small = timm.create_model(name, device="meta").default_cfg["input_size"][1] == 32  # type: ignore[attr-defined]
    check_whole(name, backend, 16 if small else 64)


def check_whole(name: str, backend: Counting, size: int | None = None) -> None:
    size = size or side(name)
    model = vit() if name == "vit_tiny" else calibrated(name, images=random_images(8, size))
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for seed in (1, 2):
            images = random_images(2, size, seed=seed)
            assert torch.equal(compiled(images), model(images))
    assert backend.taken() == (1, 2)


@pytest.mark.parametrize("name", ["sd_resnet20", *slow("sd_wide_resnet16_4")])
def test_a_whole_model_by_aot_autograd_computes_the_same(name: str) -> None:
    model, images = make(name), random_images(2, 16)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(model(images), compiled(images), tol=1e-5)


@pytest.mark.parametrize("name", [*WHOLE, *slow(*MORE)])
def test_a_whole_model_with_masks_per_sample_trains_as_one_graph(name: str, backend: Counting) -> None:
    model, images = make(name, mode="sample").train(), random_images(4, side(name))
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    outs = []
    for seed in range(3):
        torch.manual_seed(seed)
        outs.append(compiled(images))
        F.cross_entropy(outs[-1], torch.arange(4)).backward()
        torch.manual_seed(seed)
        plain = twin(images)
        F.cross_entropy(plain, torch.arange(4)).backward()
        assert torch.equal(outs[-1], plain)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.equal(a.grad, b.grad)
    assert backend.taken() == (1, 3)
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    with torch.no_grad():
        compiled.eval()
        assert torch.equal(compiled(images), twin.eval()(images))
    assert backend.taken() == (1, 1)


def test_masks_of_a_compiled_model_are_those_of_its_probabilities(backend: Counting) -> None:
    model = make("sd_resnet20", mode="sample", survival_probs=[1.0] * 8 + [0.3]).train()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    image, kept, masks = random_images(1, 8).expand(64, -1, -1, -1), 0, set()
    for norm in model.layer3[2].modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    with torch.no_grad():
        alone = make("sd_resnet20", mode="batch").train()
        alone.load_state_dict(model.state_dict())
        for a, b in zip(alone.layer3[2].children(), model.layer3[2].children(), strict=True):
            a.train(b.training)
        with sdzoo.fixed_gates(alone, [1] * 9):
            with_branch = alone(image)[0]
        for _ in range(8):
            out = compiled(image)
            mask = (out - with_branch).abs().amax(1) < 1e-3
            kept += int(mask.sum())
            masks.add(tuple(mask.tolist()))
    assert len(masks) == 8
    assert abs(kept / 512 - 0.3) < 4 * (0.3 * 0.7 / 512) ** 0.5
    assert backend.taken() == (1, 8)


def test_a_warm_up_of_a_whole_compiled_model_never_falls_back(backend: Counting) -> None:
    model, images = make("sd_resnet20", mode="sample").train(), random_images(4, 16)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for epoch in range(12):
            sdzoo.set_draw_probs(model, [1 - (epoch + 1) / 24 * (block + 1) / 9 for block in range(9)])
            torch.manual_seed(epoch)
            out = compiled(images)
            torch.manual_seed(epoch)
            assert torch.equal(model(images), out)
    graphs, calls = backend.taken()
    assert graphs <= 3 and calls == 12


def test_a_whole_model_with_gates_per_batch_goes_on_drawing_when_compiled(backend: Counting) -> None:
    model, images = make("sd_resnet20"), random_images(4, 16)  # as upstream's train.py --torchcompile does
    twin = copy.deepcopy(model).train()
    compiled: Any = torch.compile(model.train(), backend=backend)
    draws = set()
    for seed in range(6):
        out = step(compiled, images, seed)
        for a, b in zip(out, step(twin, images, seed), strict=True):
            assert torch.equal(a, b)
        assert sdzoo.live_blocks(model) == sdzoo.live_blocks(twin)
        draws.add(tuple(sdzoo.live_blocks(model)))
    assert len(draws) > 3


# --- inductor


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_computes_the_same_by_blocks_and_whole() -> None:
    model, images = make("sd_resnet20"), random_images(4, 16)
    twin = copy.deepcopy(model).train()
    whole: Any = torch.compile(copy.deepcopy(model), fullgraph=True)
    with torch.no_grad():
        close(model(images), whole(images), tol=1e-4)
    sdzoo.compile_blocks(model)
    model.train()
    for seed in range(6):
        for a, b in zip(step(model, images, seed), step(twin, images, seed), strict=True):
            close(b, a, tol=1e-4)
    close(evaluate(twin, images), evaluate(model, images), tol=1e-4)
    sample = make("sd_wide_resnet16_4", mode="sample", blocks_per_stage=1, widths=(24, 32, 48)).train()
    compiled: Any = torch.compile(sample, fullgraph=True)
    outs = [compiled(images) for _ in range(3)]
    assert all(bool(out.isfinite().all()) for out in outs)
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    outs[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in sample.parameters())
