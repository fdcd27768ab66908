"""The Ray Serve application: pictures in over HTTP, gathered into batches, labels with probabilities out."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from model import Model
from numpy.typing import NDArray
from payload import Limits, Refused, arrays, wanted
from ray import serve
from ray.serve._private import replica
from ray.util import get_node_ip_address
from starlette.requests import Request
from starlette.responses import JSONResponse

ROUTES = {"/health": "GET", "/classify": "POST"}


@serve.deployment
class Classifier:
    """One replica: one model, one thread that decodes and computes, and one that talks."""

    def __init__(self, folder: str) -> None:
        """Load the exported ``folder``."""
        bind_to_node()
        self.model = Model(folder, threads=1)
        self.worker = ThreadPoolExecutor(1)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take ``user_config`` of config.yaml; Serve calls this at the start and when it changes."""
        self.limits = Limits(**user_config["limits"])
        size, compared = user_config["max_batch_size"], self.model.card["input"]["largest_batch"]
        if not 1 <= size <= compared:
            raise ValueError(f"max_batch_size is {size}; 1 to {compared}, the largest that was compared with PyTorch")
        batches: Any = self.logits  # what serve.batch has added to it
        batches.set_max_batch_size(size)
        batches.set_batch_wait_timeout_s(user_config["batch_wait_timeout_s"])

    async def check_health(self) -> None:
        """Compute one blank image; Serve replaces a replica where this raises or takes too long."""
        # Not in the worker: a replica that has much to do is not ill.
        await asyncio.to_thread(self.model.run, np.zeros((1, *self.model.input_shape), self.model.dtype))

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer ``GET /health`` and ``POST /classify``."""
        try:
            return JSONResponse(await self._answer(request))
        except Refused as refused:
            return JSONResponse({"error": str(refused)}, refused.status)

    @serve.batch
    async def logits(self, images: list[NDArray[Any]]) -> list[tuple[NDArray[np.float32], int]]:
        """Return the logits of each image and how many were computed together; Serve gathers ``images``."""
        rows = await self._in_worker(self.model.run, np.stack(images))
        return [(row, len(images)) for row in rows]

    async def _answer(self, request: Request) -> dict[str, Any]:
        path = request.url.path
        if path not in ROUTES:
            raise Refused(f"{path[:60]!r} is not here; known: GET /health, POST /classify", 404)
        if request.method != ROUTES[path]:
            raise Refused(f"{request.method} {path}; {path} takes {ROUTES[path]}", 405)
        if path == "/health":
            await self.check_health()
            return {"status": "ok"} | {name: self.model.card[name] for name in ("model", "tag", "precision")}
        k, with_logits = wanted(request.query_params, len(self.model.card["labels"]))
        body = await self._body(request)
        kind = request.headers.get("content-type", "")
        images = await self._in_worker(arrays, kind, body, self.model, self.limits)
        answers = await asyncio.gather(*(self.logits(image) for image in images))
        return {"model": self.model.card["model"], "images": [self._image(*a, k, with_logits) for a in answers]}

    async def _body(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "0")
        body = bytearray()
        if int(declared) <= self.limits.body_bytes:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self.limits.body_bytes:
                    break
            else:
                return bytes(body)
        raise Refused(f"the body has more than {self.limits.body_bytes} bytes", 413)

    def _image(self, logits: NDArray[np.float32], batch_size: int, k: int, with_logits: bool) -> dict[str, Any]:
        if not np.isfinite(logits).all():
            raise Refused(f"{self.model.card['model']} gives values that are not finite for this image", 422)
        answer = {"top": self.model.top(logits, k), "batch_size": batch_size}
        return answer | ({"logits": logits.tolist()} if with_logits else {})

    async def _in_worker(self, function: Any, *arguments: Any) -> Any:
        # One thread a replica, as its num_cpus says: requests wait in line here, not for each other's processor.
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *arguments)


def bind_to_node() -> None:
    """Let this replica listen on the address of its Ray node only, 127.0.0.1 unless there are several machines.

    Ray 2.60 opens a port for calls from other deployments in each replica, on every address of the machine, and whoever
    reaches it can run code there. It does so after ``Classifier.__init__``, and offers no setting.
    """
    bind = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, _: bind(server, f"{get_node_ip_address()}:0")
