"""The folder that is published, built from a run or a checkpoint and proved to load as the model it came from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from sdzoo.deploy.onnx_export import Settings, build_onnx, labels_of
from sdzoo.deploy.verification import default_images, normalised
from sdzoo.digest import file_sha256
from sdzoo.errors import InputError, ParityError
from sdzoo.files import atomic_folder
from sdzoo.hub.layout import (
    CARD,
    CONFIG,
    CURVE,
    LABELS,
    MODEL,
    ONNX,
    PARITY,
    RECIPE,
    RESOLVED_RECIPE,
    RESULTS,
    SUMS,
    published_files,
    write_sums,
)
from sdzoo.hub.measured import Figures, Measured, read_measured
from sdzoo.hub.model_card import CARD_WORDS, DATASETS, Facts, model_card
from sdzoo.hub.private import PRIVATE, check_private, private_names_in
from sdzoo.images import input_config
from sdzoo.macs import count_macs
from sdzoo.plots import draw_runs
from sdzoo.survival import survival_probs
from sdzoo.training.checkpoint import describe, load_model, read_checkpoint, save_weights
from sdzoo.training.recipe import Recipe
from sdzoo.training.recipe_yaml import dump_yaml
from sdzoo.training.run_folder import RunFolder

IMAGES = 17
# What a configuration of timm's says of other weights than these.
OF_OTHERS = ("origin_url", "paper_ids", "paper_name", "notes", "description", "tag", "label_names")


@dataclass(frozen=True)
class Subject:
    """What shall be published: a model in evaluation, and what its run measured, None of a bare checkpoint."""

    source: Path
    model: nn.Module
    measured: Measured | None


@dataclass(frozen=True)
class Details:
    """What only its publisher knows: the model's name, how timm finds it, licence, data set; and whether ONNX too."""

    title: str
    license: str
    address: str | None = None
    data_name: str | None = None
    onnx: bool = False


def open_subject(source: str | Path, no_metrics: bool = False, arch: str | None = None) -> Subject:
    """Return the model of a run's folder or of a checkpoint; ``best.safetensors`` in a run's folder means the run.

    Raises:
        InputError: as :func:`read_measured` and :func:`load_model`; or for a checkpoint, which knows no figures,
            without ``no_metrics``.
    """
    path = Path(source)
    run = RunFolder(path if path.is_dir() else path.parent)
    if (path / SUMS).is_file():
        raise InputError(f"{path} is what was published, not a run: name the run's folder, or a checkpoint")
    if path.is_dir() or (path == run.best and run.recipe.is_file()):
        if arch:
            raise InputError(f"--arch {arch} is for a checkpoint that does not say which model it is, not for a run")
        measured = read_measured(run.path, no_metrics)
        return Subject(run.path, load_model(run.best), measured)
    model = load_model(path, arch)
    if not no_metrics:
        raise InputError(
            f"{path} is a checkpoint without its run, so there are no figures for the card: name the run's folder, or "
            "publish with --no-metrics, which the card then says"
        )
    return Subject(path, model, None)


def write_folder(
    subject: Subject, out: str | Path, details: Details, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Make the folder ``out``, whole or not at all; one that was published before is replaced.

    Raises:
        InputError: if ``out`` holds other things, or what would be published names this machine, or the run changed
            meanwhile; and as :func:`sdzoo.export_onnx`.
        ParityError: if what was written does not load as the model that it came from.
        MissingExtra: without the extra ``plots``, or ``onnx`` where it is asked for.
    """
    with atomic_folder(out, published_files) as folder:
        _fill(folder, subject, details, progress)
        progress("loading what was written")
        check_loads(folder, subject.model)
        _check_still(subject)


def _check_still(subject: Subject) -> None:
    """Check that what was read one after the other belongs together: a run may go on at any time."""
    measured = subject.measured
    if measured and read_measured(subject.source, measured.figures is None) != measured:
        raise InputError(f"{subject.source} changed while it was read; run again")


def check_loads(folder: Path, model: nn.Module) -> None:
    """Check that timm creates from ``folder`` what computes the logits of ``model`` to the bit.

    Raises:
        ParityError: if not.
    """
    found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    there, here = _logits(found), _logits(model)
    if not here.isfinite().all():
        raise ParityError("the model's logits are not finite: its weights are damaged or untrained")
    if not torch.equal(there, here):
        most = (there - here).abs().max().item() if there.shape == here.shape else f"shape {tuple(there.shape)}"
        raise ParityError(f"{folder} does not compute what was published: logits on {IMAGES} images differ by {most}")


@torch.inference_mode()
def _logits(model: nn.Module) -> Tensor:
    config = input_config(model)
    return model(normalised(default_images(config).read(range(IMAGES)), config))


def _fill(folder: Path, subject: Subject, details: Details, progress: Callable[[str], None]) -> None:
    model, measured = subject.model, subject.measured
    labels = labels_of(model)
    if details.data_name:
        _check_data_name(details.data_name, measured)
    elif measured and measured.data == PRIVATE:
        raise InputError("what the run calls its data set is not published as it is: call it with --data")
    elif measured and not measured.recipe.dataset and private_names_in(measured.data):
        raise InputError(f'the data set\'s name "{measured.data}" holds that of host or user: call it with --data')
    description = describe(model, tuple(labels or ()))
    save_weights(folder / MODEL, model, description)
    _write_config(folder / CONFIG, model, description, details.license)
    proof = _write_onnx(folder, model, progress) if details.onnx else None
    facts = Facts(
        title=details.title,
        address=details.address,
        arch=model.pretrained_cfg["architecture"],  # type: ignore[index]
        license=details.license,
        data_name=details.data_name,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, input_config(model)["input_size"]),
        survival_probs=survival_probs(model),
        sha256=file_sha256(folder / MODEL),
        onnx=proof,
    )
    _write_json(folder / RESULTS, _results(facts, measured, read_checkpoint(folder / MODEL)[1]["state_sha256"]))
    if measured:
        (folder / RECIPE).write_text(_given(measured.recipe), encoding="utf-8")
        (folder / RESOLVED_RECIPE).write_text(measured.recipe.to_yaml(), encoding="utf-8")
        if measured.figures:
            progress("drawing the run")
            _draw(measured.folder, folder / CURVE, details.title)
    (folder / CARD).write_text(model_card(facts, measured), encoding="utf-8")
    private = {str(subject.source.absolute())} | {text for text, _ in (measured.cut if measured else ())}
    typed = [details.title, (details.address or "").partition(":")[2], details.license, details.data_name]
    typed += [measured.recipe.dataset] if measured and measured.recipe.dataset in DATASETS else []
    check_private(folder, private, [words for words in typed if words], CARD_WORDS)
    write_sums(folder)


def _check_data_name(name: str, measured: Measured | None) -> None:
    if measured is None or (measured.recipe.dataset and measured.data != PRIVATE):
        known = f", which knows its data as {measured.data}" if measured else ", not for a checkpoint"
        raise InputError(f"--data is for a run on a folder of images{known}")
    if not name.isprintable() or len(name) > 100:
        raise InputError(f"--data {name[:100]!r} is not one printable line of at most 100 characters")


def _write_config(path: Path, model: nn.Module, description: dict[str, Any], license: str) -> None:
    """Write timm's configuration of ``model``, without what it says of the weights that timm would have taken."""
    save_config_for_hf(model, str(path), {"label_names": description["labels"], "pretrained_cfg": {"license": license}})
    config = json.loads(path.read_text(encoding="utf-8"))
    inner = {name: value for name, value in config["pretrained_cfg"].items() if name not in OF_OTHERS}
    arguments = {name: description[name] for name in ("num_classes", "in_chans", "mode")} | description["model_kwargs"]
    _write_json(path, config | {"model_args": arguments, "pretrained_cfg": inner})


def _write_onnx(folder: Path, model: nn.Module, progress: Callable[[str], None]) -> str:
    """Write the verified ONNX file, its labels and what proved it, and return the last in a sentence."""
    built = build_onnx(model, Settings(), progress)
    (folder / ONNX).write_bytes(built.content)
    names = built.metadata["labels"] or [str(index) for index in range(model.num_classes)]  # type: ignore[arg-type]
    _write_json(folder / LABELS, names)
    _write_json(folder / PARITY, built.metadata["parity"])
    return f"{built.proof} ({built.metadata['parity']['inputs']}, {built.metadata['parity']['runtime']})"


def _results(facts: Facts, measured: Measured | None, state_sha256: str) -> dict[str, Any]:
    known = {
        "model": facts.arch,
        "parameters": facts.parameters,
        "macs": dataclasses.asdict(facts.macs),
        "survival_probs": list(facts.survival_probs),
        "state_sha256": state_sha256,
    }
    if measured is None:
        return known | {"figures": None}
    return known | {
        "data": facts.data_name or measured.data,
        "training_images": measured.training_images,
        "corrupt_images": measured.corrupt_images,
        "epochs": measured.recipe.epochs,
        "training_s": round(measured.training_s, 1),
        "environment": measured.environment,
        "forced_in_epochs": measured.forced,
        "figures": _plain(measured.figures),
    }


def _plain(figures: Figures | None) -> dict[str, Any] | None:
    return dataclasses.asdict(figures) | {"runs": 1} if figures else None


def _given(recipe: Recipe) -> str:
    """Return what ``recipe`` sets otherwise than by default: all that its writer had to say."""
    default = dataclasses.asdict(Recipe(model="", epochs=0, lr=-1.0))
    values = dataclasses.asdict(recipe)
    own = {name: value for name, value in values.pop("sdzoo").items() if value != default["sdzoo"][name]}
    given = {name: value for name, value in values.items() if value != default[name]}
    return dump_yaml(given | ({"sdzoo": own} if own else {}))


def _draw(run: RunFolder, picture: Path, title: str) -> None:
    """Draw the run under the published name: that of its folder is its owner's."""
    with tempfile.TemporaryDirectory() as scratch:
        named = Path(scratch, title)
        named.mkdir()
        for file in (run.log, run.steps, run.recipe, run.result):
            if file.is_file():
                shutil.copyfile(file, named / file.name)
        png, _ = draw_runs([named], Path(scratch, "curve"))
        shutil.copyfile(png, picture)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
