"""The kit export/triton against a real tritonserver; run in the environment that its requirements.txt makes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cards import put_card
from exported import export_folder, load_file, without_classifier
from nets import close
from numpy.typing import NDArray
from triton_server import KIT, Server, errors_of, running

import sdzoo
from sdzoo.assets import pictures as demo_pictures
from sdzoo.deploy.card import digests
from sdzoo.deploy.predictor import model_predictor
from sdzoo.deploy.triton import write_repository

if importlib.util.find_spec("pytriton") is None:
    pytest.skip("no tritonserver: pip install -r export/triton/requirements.txt", allow_module_level=True)

pictures = sys.modules["pictures"] = load_file(KIT / "pictures.py")
client = load_file(KIT / "client.py")

REQUESTS = 256
FILES = list(demo_pictures().values())


@pytest.fixture(scope="module", params=["client", "in-graph"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder exported for the python backend, with either preprocessing. Read only."""
    model = timm.create_model("sd_resnet20", pretrained=True).eval()
    exported = tmp_path_factory.mktemp("exported") / "folder"
    sdzoo.export(model, "triton", exported, backend="python", preprocess=request.param)
    return exported


@pytest.fixture(scope="module")
def card(folder: Path) -> dict[str, Any]:
    """Return the card of ``folder``."""
    return pictures.read_card(folder)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a Triton that serves ``folder``."""
    with running(folder, tmp_path_factory.mktemp("log") / "log") as one:
        yield one


def reference(card: dict[str, Any], folder: Path, batch: NDArray[Any]) -> NDArray[np.float32]:
    """Return what ONNX Runtime computes from the file here, one image a call."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / card["file"], providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(["logits"], {"images": image[None]})[0]) for image in batch])


def array(card: dict[str, Any], file: Path) -> NDArray[Any]:
    """Return a picture as the model takes it."""
    return pictures.to_array(pictures.open_picture(file), card)


def noise(card: dict[str, Any], count: int) -> NDArray[Any]:
    """Return ``count`` different images of the type that the model takes."""
    shape = (count, *card["input"]["shape"][1:])
    rng = np.random.default_rng(0)
    return (
        rng.integers(0, 256, shape, np.uint8)
        if card["input"]["dtype"] == "uint8"
        else rng.normal(size=shape).astype("f4")
    )


def ask_at_once(server: Server, card: dict[str, Any], images: NDArray[Any]) -> NDArray[np.float32]:
    """Return the answers to one request for each image, all sent at the same time over connections of their own."""
    together = threading.Barrier(len(images))

    def ask(index: int) -> NDArray[np.float32]:
        connection = server.connection()
        connection.connect()
        together.wait(60)
        try:
            return client.infer(connection, card, images[index : index + 1])
        finally:
            connection.close()

    with ThreadPoolExecutor(len(images)) as pool:
        return np.concatenate(list(pool.map(ask, range(len(images)))))


def equal(reference: NDArray[np.float32], answers: NDArray[np.float32]) -> None:
    """Assert design.md's limit."""
    close(torch.from_numpy(reference), torch.from_numpy(np.array(answers)), 1e-4)


# The configuration


@pytest.mark.parametrize("preprocess", ["client", "in-graph"])
@pytest.mark.parametrize("backend", [None, "onnxruntime-tensorrt"])
def test_the_onnxruntime_configuration_is_good_to_the_last_step(
    tmp_path: Path, backend: str | None, preprocess: str
) -> None:
    """This Triton has no such backend: what it says last of a good configuration is that it cannot find it."""
    model = timm.create_model("sd_resnet20", pretrained=True).eval()
    out = tmp_path / "out"
    sdzoo.export(model, "triton", out, backend=backend, preprocess=preprocess)
    assert f"tritonserver --model-repository={out}/model_repository" in (out / "README.md").read_text()
    card = pictures.read_card(out)
    equal(model_predictor(model)(FILES), reference(card, out, np.stack([array(card, file) for file in FILES])))
    errors = errors_of(out, tmp_path / "log")
    assert errors
    assert all("unable to find backend library for backend 'onnxruntime'" in line for line in errors), errors


@pytest.mark.parametrize(
    ("pattern", "other", "said"),
    [
        ("max_batch_size: 64", "max_batch_size: -1", "max_batch_size"),
        ("TYPE_FP32", "TYPE_FLOAT", "TYPE_FLOAT"),
        ("label_filename", "labels", "labels"),
        ("FORMAT_N", "FORMAT_M", "FORMAT_M"),
    ],
)
def test_a_bad_configuration_is_refused_earlier(
    tmp_path: Path, folder: Path, card: dict[str, Any], pattern: str, other: str, said: str
) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns("model_repository")))
    config = write_repository(out / "model_repository", "net", folder / card["file"], card) / "config.pbtxt"
    assert pattern in config.read_text()
    config.write_text(config.read_text().replace(pattern, other))
    put_card(out, file="model_repository/net/1/model.onnx", files=digests(out))
    errors = errors_of(out, tmp_path / "log")
    assert not any("unable to find backend library" in line for line in errors)
    assert said in (tmp_path / "log").read_text()


def test_the_server_reads_what_was_written(server: Server, card: dict[str, Any]) -> None:
    status, content = server.get("/v2/models/sd_resnet20/config")
    config = json.loads(content)
    assert status == 200
    assert config["max_batch_size"] == 64
    assert config["input"][0]["data_type"] == ("TYPE_UINT8" if card["input"]["dtype"] == "uint8" else "TYPE_FP32")
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert [warmup["name"] for warmup in config["model_warmup"]] == ["batch_1", "batch_64"]


# Serving


def test_readiness_and_metrics_are_answered(server: Server) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/sd_resnet20/ready"):
        assert server.get(path)[0] == 200
    assert server.get("/v2/models/other/ready")[0] != 200
    status, text = server.get("/metrics", "metrics")
    assert status == 200
    assert "nv_inference_request_success" in text


def test_it_listens_on_this_machine_only(server: Server) -> None:
    """Listening sockets are those of state 0A; 0100007F is 127.0.0.1, as such or as an address of IPv6."""
    listening: dict[int, set[str]] = {}
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                address, port = local.split(":")
                listening.setdefault(int(port, 16), set()).add(address.removeprefix("0000000000000000FFFF0000"))
    assert [listening[port] for port in server.ports.values()] == [{"0100007F"}] * 3


def test_concurrent_requests_are_batched_and_each_gets_its_own_answer(
    server: Server, folder: Path, card: dict[str, Any]
) -> None:
    images = noise(card, REQUESTS)
    counted, executed = server.metric("nv_inference_count"), server.metric("nv_inference_exec_count")
    answers = ask_at_once(server, card, images)
    counted, executed = (
        server.metric("nv_inference_count") - counted,
        server.metric("nv_inference_exec_count") - executed,
    )
    local = reference(card, folder, images)
    equal(local, answers)
    assert len(np.unique(local, axis=0)) == REQUESTS  # no answer can stand for another's
    assert counted == REQUESTS
    assert 0 < executed < REQUESTS
    same = int((local == answers).all(1).sum())
    print(f"{REQUESTS} requests, {executed:.0f} executions, {same} answers equal to the last bit")


def test_instances_work_side_by_side(tmp_path: Path, folder: Path, card: dict[str, Any]) -> None:
    """As README.md says: `count` in the configuration, which is then the user's own."""
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    config = out / "model_repository" / card["model"] / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    assert "config.pbtxt is damaged: its sha256" in refused(out)
    images = noise(card, 32)
    with running(out, tmp_path / "log", "--own-config") as server:
        equal(reference(card, folder, images), ask_at_once(server, card, images))
        assert len(re.findall("TRITONBACKEND_ModelInstanceInitialize", server.log.read_text())) == 2


def test_labels_are_known_to_the_server(server: Server, card: dict[str, Any]) -> None:
    """Triton's own classification extension answers with lines of labels.txt."""
    image = array(card, demo_pictures()["truck"])[None]
    datatype = client.DATATYPES[card["input"]["dtype"]]
    tensor = {"name": "images", "shape": image.shape, "datatype": datatype, "data": image.ravel().tolist()}
    wanted = {"name": "logits", "parameters": {"classification": 3}}
    connection = server.connection()
    connection.request("POST", "/v2/models/sd_resnet20/infer", json.dumps({"inputs": [tensor], "outputs": [wanted]}))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    best, *_ = answer["outputs"][0]["data"]
    assert best.split(":")[1:] == ["9", "truck"]


@dataclass
class Request:
    """What is wrong with a request; the rest of it is right.

    Attributes:
        model: Whom it asks.
        tensor: What its JSON says otherwise of the input.
        batch: Images that it holds.
        says: Images that it says to hold.
        cut: Bytes missing at its end.
        header: What it holds in place of all.
        length: What it says of the length of its JSON.
    """

    model: str = "sd_resnet20"
    tensor: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    says: int | None = None
    cut: int = 0
    header: bytes | None = None
    length: str | None = None


MALFORMED = {
    "other model": Request(model="sd_resnet111"),
    "other shape": Request(tensor={"shape": [1, 3, 32, 33]}),
    "no batch": Request(tensor={"shape": [3 * 32 * 32]}),
    "other type": Request(tensor={"datatype": "INT64"}),
    "unknown type": Request(tensor={"datatype": "FP7"}),
    "other name": Request(tensor={"name": "pixels"}),
    "over the largest batch": Request(batch=65),
    "empty batch": Request(batch=0),
    "negative batch": Request(says=-1),
    "less than it says": Request(says=2),
    "more than it says": Request(batch=2, says=1),
    "cut short": Request(cut=4),
    "nothing": Request(header=b""),
    "no JSON": Request(header=b"{"),
    "no inputs": Request(header=b"{}"),
    "a header beyond the content": Request(length="1000000000"),
    "a header that is no number": Request(length="many"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_is_refused_and_the_server_lives(
    server: Server, folder: Path, card: dict[str, Any], kind: str
) -> None:
    request, image = MALFORMED[kind], noise(card, 1)
    data = image.tobytes() * request.batch
    shape = [request.batch if request.says is None else request.says, *image.shape[1:]]
    datatype = client.DATATYPES[card["input"]["dtype"]]
    size = {"binary_data_size": len(data)}
    tensor = {"name": "images", "shape": shape, "datatype": datatype, "parameters": size} | request.tensor
    header, body = json.dumps({"inputs": [tensor]}).encode(), data[: len(data) - request.cut]
    if request.header is not None:
        header, body = request.header, b""
    length = request.length or str(len(header))
    connection = server.connection()
    connection.request("POST", f"/v2/models/{request.model}/infer", header + body, {client.LENGTH: length})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    assert response.status >= 400, content  # Triton says 400, and 500 where its JSON parser fails
    assert json.loads(content)["error"]
    connection = server.connection()
    equal(reference(card, folder, image), client.infer(connection, card, image))
    connection.close()


# The client


def run_client(server: Server, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, KIT / "client.py", folder, f"--url=127.0.0.1:{server.ports['http']}", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)


def test_the_client_says_of_the_demo_pictures_what_sdzoo_says(server: Server, folder: Path) -> None:
    done = run_client(server, folder, *FILES)
    assert done.returncode == 0, done.stderr
    expected = []
    predictor = model_predictor(timm.create_model("sd_resnet20", pretrained=True).eval())
    for file, best in zip(FILES, predictor.top(FILES), strict=True):
        expected += [str(file), *(f"  {one.probability:6.1%}  {one.label}" for one in best)]
    assert done.stdout.splitlines() == expected


def test_the_client_sends_no_more_pictures_at_once_than_the_model_takes(server: Server, folder: Path) -> None:
    before = server.metric("nv_inference_request_success")
    done = run_client(server, folder, *[demo_pictures()["cat"]] * 65)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cat.jpg") == 65
    assert server.metric("nv_inference_request_success") - before == 2


def test_the_client_says_what_is_wrong(server: Server, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    cat = demo_pictures()["cat"]
    unsealed = put_card(Path(shutil.copytree(folder, tmp_path / "unsealed")), files={})
    for asked, arguments, code, said in (
        (folder, [tmp_path / "empty.jpg"], 2, "empty.jpg is not a picture"),
        (tmp_path, [cat], 2, "holds no card.json"),
        (unsealed, [cat], 2, "has no sha256 of labels.json, model_repository/sd_resnet20/1/model.onnx"),
        (folder, [cat, "--model=other"], 1, "other"),
        (folder, [cat, "--url=127.0.0.1:1"], 1, "no answer from 127.0.0.1:1"),
        (folder, [cat, "--url=127.0.0.1:http"], 2, "http"),
    ):
        done = run_client(server, asked, *arguments)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


# Starting and ending


def test_a_port_in_use_is_said(server: Server, folder: Path) -> None:
    port = server.ports["http"]
    command = [sys.executable, KIT / "serve.py", folder, f"--http-port={port}"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def refused(*arguments: str | Path) -> str:
    """Return why serve.py does not start tritonserver: one line."""
    command = [sys.executable, KIT / "serve.py", *arguments, "--http-port=1"]  # a port that would be refused later
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_a_folder_of_another_kind_is_said(tmp_path: Path) -> None:
    assert "holds no card.json" in refused(tmp_path)
    assert "is not what `sdzoo export --to triton` wrote" in refused(export_folder(tmp_path / "onnx"))


@pytest.mark.parametrize("name", ["1/model.onnx", "1/model.py", "config.pbtxt", "labels.txt"])
def test_a_damaged_file_is_not_served(tmp_path: Path, folder: Path, card: dict[str, Any], name: str) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    file = out / "model_repository" / card["model"] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{name} is damaged: its sha256 is not the one in card.json" in refused(out)
    file.unlink()
    assert f"{name} is missing" in refused(out, "--own-config")


def test_a_changed_card_is_not_served(tmp_path: Path, folder: Path) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    text = (out / "card.json").read_text()
    (out / "card.json").write_text(text.replace("0.4914", "4.4914"))
    assert "card.json is damaged: its sha256 is not the seal in it" in refused(out)


def test_features_are_served_but_not_named(tmp_path: Path) -> None:
    out = without_classifier(tmp_path / "out", "triton", "python")
    image = np.zeros((1, 3, 32, 32), np.float32)
    with running(out, tmp_path / "log") as server:
        sealed = pictures.read_sealed(out)
        with contextlib.closing(server.connection()) as connection:
            assert client.infer(connection, sealed, image).shape == (1, 64)
        done = run_client(server, out, demo_pictures()["cat"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "gives features: its model has no classifier" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ending_the_script_ends_all_that_it_started(tmp_path: Path, folder: Path, number: signal.Signals) -> None:
    with running(folder, tmp_path / "log") as server:
        server.process.send_signal(number)
        if number != signal.SIGKILL:
            assert server.process.wait(60) == 0
            with pytest.raises(ProcessLookupError):  # the group has no member left
                os.killpg(server.process.pid, 0)
            return
        server.process.wait(60)
        end = time.monotonic() + 60
        while server.listens():
            assert time.monotonic() < end, "the server outlived the script"
            time.sleep(0.1)
