"""The model of Triton's python backend: copied beside model.onnx as model.py, and run by the server, not by sdzoo.

One call of ``execute`` holds all the requests that Triton batched; they are computed as one batch by ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore  # Triton's own, there only inside the server


class TritonPythonModel:
    """Runs the ONNX file that lies beside this one."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the file; cores are shared evenly among the instances, which otherwise wait for each other.

        Raises:
            ValueError: if it is damaged; Triton then does not serve it.
        """
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import
        import onnxruntime

        config = json.loads(args["model_config"])
        instances = sum(group["count"] for group in config["instance_group"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = max(1, len(os.sched_getaffinity(0)) // instances)
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        seal = self.session.get_modelmeta().custom_metadata_map.get("file_sha256", "").strip('"').encode()
        if not seal or hashlib.sha256(file.read_bytes().replace(seal, b"0" * 64)).hexdigest().encode() != seal:
            raise ValueError(f"{file} is damaged: its sha256 is not the one in its metadata")
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request, in their order."""
        arrays = [pb_utils.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        (outputs,) = self.session.run([self.output], {self.input: np.concatenate(arrays)})
        ends = np.cumsum([len(array) for array in arrays])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(self.output, np.ascontiguousarray(part))])
            for part in np.split(np.asarray(outputs), ends)
        ]
