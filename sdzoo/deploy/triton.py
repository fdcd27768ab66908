"""A Triton model repository: a verified ONNX file, and the configuration by which Triton serves it.

    <folder>/<name>/config.pbtxt
                    labels.txt
                    1/model.onnx    and beside it, for the python backend, model.py

The configuration is built as Triton's own message and printed: a field or type that Triton does not know cannot be
written.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdzoo.errors import InputError, nearest
from sdzoo.extras import require
from sdzoo.files import atomic_folder

BACKENDS = ("onnxruntime", "python")
VERSION = "1"
# A folder's name, a part of an address (/v2/models/<name>/infer) and a label of the metrics, all three unquoted.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
DTYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}
TENSORRT_PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}
MOST_INSTANCES = 1024
PYTHON_MODEL = Path(__file__).with_name("triton_model.py")


def write_repository(
    folder: str | Path,
    name: str,
    model: bytes | str | Path,
    card: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    backend: str = "onnxruntime",
    tensorrt: bool = False,
    instances: int = 1,
    largest_batch: int = 64,
) -> Path:
    """Write ``model`` and its configuration as ``folder/name``, replacing such a model, and return that path.

    Args:
        folder: The model repository; made if it is not there. It may hold other models.
        name: What clients call the model.
        model: A verified ONNX file, or its content.
        card: What card.json says of it: input, output, precision.
        labels: Class names; default: their numbers.
        backend: ``onnxruntime``, on a GPU where Triton has one; or ``python``, which runs ONNX Runtime on the CPU.
        tensorrt: Let the onnxruntime backend compile the model with TensorRT; needs a GPU. An int8 file must be one
            that was quantised for TensorRT.
        instances: Copies of the model that work at the same time.
        largest_batch: Images that Triton may put into one call; at most what the model was compared at.

    Raises:
        InputError: naming what is possible, if one of these cannot be; or if ``folder/name`` holds something else.
        ImportError: without the extra ``triton``.
    """
    require("tritonclient", "grpc")
    if not NAME.fullmatch(name):
        raise InputError(f'"{name}" cannot name a model of Triton; 1 to 100 of A-Z a-z 0-9 _ . -, not . or - first')
    content = _onnx_content(model)
    names = _labels(labels, card)
    config = _config(name, card, bool(names), backend, tensorrt, instances, largest_batch)
    text = importlib.import_module("google.protobuf.text_format").MessageToString(config)

    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_folder(Path(folder) / name, _own_files) as made:
        (made / VERSION).mkdir()
        (made / "config.pbtxt").write_text(text, encoding="utf-8")
        if names:
            (made / "labels.txt").write_text("".join(f"{label}\n" for label in names), encoding="utf-8")
        (made / VERSION / "model.onnx").write_bytes(content)
        if backend == "python":
            shutil.copyfile(PYTHON_MODEL, made / VERSION / "model.py")
    return Path(folder) / name


def _own_files(model: Path) -> Collection[str]:
    files = {"config.pbtxt", "labels.txt", f"{VERSION}/model.onnx", f"{VERSION}/model.py"}
    return files if (model / "config.pbtxt").is_file() else ()


def _onnx_content(model: bytes | str | Path) -> bytes:
    where = "the model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes):
        if not Path(model).is_file():
            raise InputError(f"{model} is not a file")
        model = Path(model).read_bytes()
    if not model.startswith(b"\x08"):  # the tag of ir_version, which every ONNX file begins with
        raise InputError(
            f"{where} is no ONNX file, and Triton is given nothing else: an engine fits one version of TensorRT and "
            "one kind of GPU, one of TensorRT for RTX fits no Triton; with tensorrt=True Triton compiles the ONNX file"
        )
    return model


def _labels(labels: Sequence[str] | None, card: Mapping[str, Any]) -> list[str]:
    """Return the names of the outputs' classes, one a line of labels.txt; none for a model without classifier."""
    if card["output"]["name"] != "logits":
        return []
    classes = card["output"]["shape"][-1]
    if labels is None:
        return [str(index) for index in range(classes)]
    if len(labels) != classes:
        raise InputError(f"{len(labels)} labels for {classes} classes")
    for index, label in enumerate(labels):
        if not label.strip() or len(label.splitlines()) != 1:
            raise InputError(f"labels[{index}] is {label!r}; labels.txt takes one line, not empty, for each class")
    return list(labels)


def _config(
    name: str,
    card: Mapping[str, Any],
    has_labels: bool,
    backend: str,
    tensorrt: bool,
    instances: int,
    largest_batch: int,
) -> Any:
    """Return the ``ModelConfig`` for the model of ``card``."""
    if backend not in BACKENDS:
        raise InputError(f'backend "{backend}" is unknown; known: {", ".join(BACKENDS)}{nearest(backend, BACKENDS)}')
    if not 1 <= instances <= MOST_INSTANCES:
        raise InputError(f"instances is {instances}; 1 to {MOST_INSTANCES}")
    compared = card["input"]["largest_batch"]
    if not 1 <= largest_batch <= compared:
        raise InputError(
            f"largest_batch is {largest_batch}; 1 to {compared}, the largest that the model was compared at"
        )
    messages = importlib.import_module("tritonclient.grpc.model_config_pb2")
    config = messages.ModelConfig(
        name=name,
        backend=backend,
        default_model_filename="model.py" if backend == "python" else "model.onnx",
        max_batch_size=largest_batch,
    )
    config.version_policy.latest.num_versions = 1
    images = config.input.add(**_tensor(card["input"]))
    images.format = messages.ModelInput.Format.Value(f"FORMAT_{card['input']['layout']}")
    logits = config.output.add(**_tensor(card["output"]))
    if has_labels:
        logits.label_filename = "labels.txt"
    kind = "KIND_CPU" if backend == "python" else "KIND_GPU" if tensorrt else "KIND_AUTO"
    config.instance_group.add(count=instances, kind=messages.ModelInstanceGroup.Kind.Value(kind))
    # No preferred size and no delay: an idle instance answers at once, a busy one takes all that came meanwhile.
    config.dynamic_batching.SetInParent()
    # Both ends, so that what is allocated, or compiled for a range of shapes, is there before the first request.
    for size in sorted({1, largest_batch}):
        warmup = config.model_warmup.add(name=f"batch_{size}", batch_size=size)
        entry = warmup.inputs[images.name]
        entry.data_type, entry.zero_data = images.data_type, True
        entry.dims.extend(images.dims)
    if tensorrt:
        _accelerate(config, card["precision"])
    return config


def _tensor(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return name, type and dims of one tensor of a card; Triton leaves the batch out of the dims."""
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{entry['name']} is {entry['dtype']}; known: {', '.join(DTYPES)}")
    if not isinstance(entry["shape"][0], str):
        raise InputError(f"{entry['name']} is {entry['shape']}; Triton batches only where the first size is open")
    return {"name": entry["name"], "data_type": DTYPES[entry["dtype"]], "dims": entry["shape"][1:]}


def _accelerate(config: Any, precision: str) -> None:
    if config.backend != "onnxruntime":
        raise InputError(f"TensorRT belongs to the onnxruntime backend; the {config.backend} backend runs on the CPU")
    if precision not in TENSORRT_PRECISIONS:
        raise InputError(f'precision "{precision}" is unknown to TensorRT; known: {", ".join(TENSORRT_PRECISIONS)}')
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    accelerator.parameters["precision_mode"] = TENSORRT_PRECISIONS[precision]
