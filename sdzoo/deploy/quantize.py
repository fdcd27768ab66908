"""Eight-bit integers: static quantisation from calibration images, as QDQ, with one preset for each kind of target."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sdzoo.errors import InputError

LEAST_IMAGES = 256


@dataclass(frozen=True)
class Preset:
    """What a target wants: weights are signed bytes, per channel."""

    signed_activations: bool
    reduce_range: bool
    quantise_bias: bool
    ends_in_float: bool


PRESETS = {
    # u8 x s8 saturates on CPUs without VNNI: seven bits of weight avoid it, at the same speed. The first convolution
    # and the classifier hold little of the arithmetic and much of the loss.
    "cpu": Preset(signed_activations=False, reduce_range=True, quantise_bias=True, ends_in_float=True),
    # TensorRT takes symmetric s8 only, and no quantised bias.
    "tensorrt": Preset(signed_activations=True, reduce_range=False, quantise_bias=False, ends_in_float=False),
}


def quantize(proto: onnx.ModelProto, preset: str, batches: Iterator[NDArray[np.generic]]) -> onnx.ModelProto:
    """Return ``proto`` in eight-bit integers, calibrated on ``batches`` of its inputs; inputs and outputs stay as they
    are.

    Args:
        proto: A float32 model with one input.
        preset: ``cpu`` or ``tensorrt``.
        batches: Real images, ``LEAST_IMAGES`` or more: who exports sees to that.

    Raises:
        InputError: if the preset is unknown.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            batch = next(batches, None)
            return None if batch is None else {proto.graph.input[0].name: batch}

    if preset not in PRESETS:
        raise InputError(f'preset "{preset}" is unknown; known: {", ".join(PRESETS)}')
    chosen = PRESETS[preset]
    weighted = [node.name for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    with tempfile.TemporaryDirectory() as folder, _silent():
        quantize_static(
            onnx.shape_inference.infer_shapes(proto),
            Path(folder, "int8.onnx"),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=chosen.reduce_range,
            activation_type=QuantType.QInt8 if chosen.signed_activations else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[weighted[0], weighted[-1]] if chosen.ends_in_float else [],
            extra_options={
                "ActivationSymmetric": chosen.signed_activations,
                "WeightSymmetric": True,
                "QuantizeBias": chosen.quantise_bias,
            },
        )
        return onnx.load(Path(folder, "int8.onnx"))


@contextmanager
def _silent() -> Iterator[None]:
    """Keep ONNX Runtime from advising, on the root logger, a preprocessing that a folded graph has had."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
