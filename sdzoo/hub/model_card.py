"""The card of a published model, written from what its run measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sdzoo import __version__
from sdzoo.hub.layout import CURVE, MODEL, ONNX, SUMS
from sdzoo.hub.measured import Figures, Measured
from sdzoo.macs import Macs
from sdzoo.schedule import linear_decay

# What a data set is called, and its name on the Hub, by its name in recipes.
DATASETS = {
    "torch/cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "torch/cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "torch/svhn": ("SVHN", "ufldl-stanford/svhn"),
    "torch/imagenet": ("ImageNet-1k", "ILSVRC/imagenet-1k"),
}
TASK = "image-classification"
TEXT = """
# {title}

`{arch}` with stochastic depth (Huang et al., 2016){trained}.

| | |
|---|---|
{rows}
{curve}
## Use

```python
import sdzoo, timm

model = timm.create_model("{address}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config)  # model(transform(image)[None]) are logits
```

`import sdzoo` registers the model and must come first. `sdzoo.load_hub("{place}")` loads it with its files checked
against `{sums}`.

## Limits

timm without sdzoo cannot build this model, and stock timm's own ResNets loaded with `strict=False` would drop the
survival probabilities p, by which every branch is weighted in evaluation: they would compute another function.
{figures_hold}

## Citation

```bibtex
@inproceedings{{huang2016deep,
  title = {{Deep Networks with Stochastic Depth}},
  author = {{Huang, Gao and Sun, Yu and Liu, Zhuang and Sedra, Daniel and Weinberger, Kilian Q.}},
  booktitle = {{European Conference on Computer Vision}},
  year = {{2016}}
}}
```
"""


# As names of a host or a user they tell nothing of it.
CARD_WORDS = frozenset(re.findall(r"[^\W\d_]+", Path(__file__).read_text(encoding="utf-8").casefold()))


@dataclass(frozen=True)
class Facts:
    """What a card says of a model beside what its run measured.

    Attributes:
        title: What the model is called.
        address: By which timm creates it; None for a folder, whose place its reader knows.
        arch: Its architecture.
        license: Of the weights.
        data_name: What the data set is called; None: as its run calls it.
        parameters: Their number.
        macs: Multiply-accumulates of one image.
        survival_probs: p of every block.
        sha256: Of the file of the weights.
        onnx: How close the ONNX file came, in a sentence; None if there is none.
    """

    title: str
    address: str | None
    arch: str
    license: str
    data_name: str | None
    parameters: int
    macs: Macs
    survival_probs: Sequence[float]
    sha256: str
    onnx: str | None = None


def model_card(facts: Facts, measured: Measured | None) -> str:
    """Return the Markdown of the card, with its figures as a model-index in front; without figures it says so."""
    figures = measured.figures if measured else None
    name, hub_id = _data(facts, measured)
    data = _escaped(name)
    metadata = ModelCardData(
        license=facts.license,
        library_name="timm",
        pipeline_tag=TASK,
        tags=[TASK, "timm", "sdzoo", "stochastic-depth"],
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"] if figures else None,
        model_name=facts.title,
        eval_results=_eval_results(figures, name, hub_id) if figures else None,
    )
    rows = _training_rows(measured, data) if measured else {}
    rows |= _figure_rows(figures) if figures else {"top-1": "**not measured**: published without figures"}
    rows |= _model_rows(facts)
    text = TEXT.format(
        title=_escaped(facts.title),
        arch=facts.arch,
        trained=_trained(measured, data),
        rows="\n".join("| {} | {} |".format(name, str(value).replace("|", r"\|")) for name, value in rows.items()),
        curve=f"\n![Loss, error, gradient and live blocks over the run]({CURVE})\n" if figures else "",
        address=facts.address or "local-dir:FOLDER",
        place=facts.address.partition(":")[2] if facts.address else "FOLDER",
        sums=SUMS,
        figures_hold=f"The figures are of one run and hold for {data} alone." if figures else "",
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text.rstrip()}\n").content


def schedule_in_words(probs: Sequence[float]) -> str:
    """Return which schedule the survival probabilities ``probs`` follow, and between which values."""
    first, last = probs[0], probs[-1]
    if min(probs) == 1:
        return "constant depth: every p is 1"
    ends = f"p_1 = {first:.4g} to p_L = {last:.4g}"
    if min(probs) == max(probs):
        return f"uniform, p = {last:.4g}"
    linear = all(abs(a - b) < 1e-6 for a, b in zip(probs, linear_decay(len(probs), last), strict=True))
    return f"linear decay, {ends}" if linear else f"{ends}, from {min(probs):.4g} to {max(probs):.4g}"


def _data(facts: Facts, measured: Measured | None) -> tuple[str, str | None]:
    named = measured.data if measured else ""
    name, hub_id = DATASETS.get(named, (named, None))
    return facts.data_name or name, hub_id


def _escaped(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, in a table too."""
    return re.sub(r"[&<>|`*\[\]\\]", lambda found: f"&#{ord(found[0])};", text)


def _code(text: str) -> str:
    return "`{}`".format(text.replace("`", "'"))


def _trained(measured: Measured | None, data: str) -> str:
    if measured is None:
        return ""
    recipe = measured.recipe
    start = recipe.initial_checkpoint or (recipe.pretrained and f"the pretrained weights of {recipe.model}")
    return f", {f'fine-tuned from {_escaped(start)}' if start else 'trained from scratch'} on {data}"


def _eval_results(figures: Figures, data: str, hub_id: str | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=hub_id or data,
            dataset_name=data,
            dataset_split=top1.split,
            metric_type="accuracy",
            metric_name=f"top-1 on {role}, percent",
            metric_value=round(top1.percent, 2),
        )
        for role, top1 in (("val", figures.val), ("test", figures.test))
        if top1
    ]


def _training_rows(measured: Measured, data: str) -> dict[str, Any]:
    recipe = measured.recipe
    corrupt = f", {measured.corrupt_images} of them corrupt and substituted" if measured.corrupt_images else ""
    epochs = ", ".join(map(str, measured.forced))
    many = "s" * (len(measured.forced) > 1)
    forced = f"; the last of several: resumed by force in epoch{many} {epochs}" if measured.forced else ""
    return {
        "data": f"{data}: {measured.training_images:,} training images{corrupt}",
        "recipe": "`recipe.yaml`, every value in `recipe_resolved.yaml`" + forced,
        "epochs": f"{recipe.epochs}",
        "training time": _time(measured.training_s),
        "hardware": _in_turn(map(_hardware, measured.environment)),
        "software": _in_turn(map(_software, measured.environment)),
    }


def _in_turn(sessions: Iterable[str]) -> str:
    return "; then ".join(dict.fromkeys(sessions))


def _hardware(ran: dict[str, Any]) -> str:
    machine, device, threads = (_of_processes(ran[name]) for name in ("machine", "device", "threads"))
    where = machine if device == "cpu" else f"{device}; {machine}"
    return f"{where}; processes: {ran['world']}, threads of each: {threads}"


def _software(ran: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_of_processes(ran[name])}" for name in ("sdzoo", "torch", "timm"))


def _of_processes(value: Any) -> str:
    """Return what all processes have, or what each of several has."""
    return " and ".join(dict.fromkeys(map(str, value if isinstance(value, list) else [value])))


def _figure_rows(figures: Figures) -> dict[str, Any]:
    val, test = figures.val, figures.test
    return {
        "weights": f"of epoch {figures.best_epoch}, chosen on val",
        "top-1 on val": f"{val.percent:.2f} % of {val.images:,} images ({_code(val.split)})",
        "top-1 on test": f"**{test.percent:.2f} %** of {test.images:,} images ({_code(test.split)}), measured after "
        "training"
        if test
        else "not measured",
        "runs": 1,
    }


def _model_rows(facts: Facts) -> dict[str, Any]:
    blocks = len(facts.survival_probs)
    rows = {
        "parameters": f"{facts.parameters:,}",
        "multiply-accumulates": f"{facts.macs.evaluation / 1e6:,.0f} M an image; in training, on average over the "
        f"gates, {facts.macs.training / 1e6:,.0f} M",
        "survival probabilities": f"{schedule_in_words(facts.survival_probs)}, {blocks} blocks; they are in the file",
        f"sha256 of `{MODEL}`": f"`{facts.sha256}`",
        "published by": f"sdzoo {__version__}",
    }
    return rows | ({f"`{ONNX}`": facts.onnx} if facts.onnx else {})


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
