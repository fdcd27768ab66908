"""The Ray Serve kit over HTTP: answers, batches, refusals, a killed replica, ports. Run in its overlay environment."""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

import sdzoo
from sdzoo.assets import pictures
from sdzoo.images import normalise, resizer

if importlib.util.find_spec("ray") is None:  # importing it here would turn its warnings into errors
    pytest.skip("no Ray: pip install -r export/ray_serve/requirements.txt", allow_module_level=True)

from cards import put_card
from exported import export_folder, without_classifier
from ray_server import JPEG, JSON, KIT, PNG, Server, eventually, processes, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_folder(tmp_path_factory.mktemp("exported") / "client")


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(folder, tmp_path_factory.mktemp("server")) as server:
        yield server


def encoded(image: Image.Image, kind: str = PNG) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind.partition("/")[2])
    return buffer.getvalue()


def variants(count: int) -> list[Image.Image]:
    """Return different pictures: the demo's, turned by different angles."""
    originals = [Image.open(path).convert("RGB") for path in pictures().values()]
    return [originals[i % len(originals)].rotate(360 * i / count, expand=True) for i in range(count)]


def same_logits(got: Any, expected: NDArray[np.float32]) -> bool:
    """Return whether ``got`` is ``expected`` within design.md's limit."""
    got = np.asarray(got)
    return got.shape == expected.shape and np.abs(got - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


def base64_json(*bodies: bytes) -> bytes:
    texts = [base64.b64encode(body).decode() for body in bodies]
    return json.dumps({"image": texts[0]} if len(texts) == 1 else {"images": texts}).encode()


def test_256_requests_outlive_a_replica(server: Server, folder: Path) -> None:
    predictor = sdzoo.load_predictor(folder / "model.onnx")
    requests, expected = [], []
    for i, image in enumerate(variants(256)):
        body, kind = encoded(image, PNG if i % 2 else JPEG), PNG if i % 2 else JPEG
        (logits,) = predictor(Image.open(io.BytesIO(body)))
        if i % 4 == 2:
            body, kind = base64_json(body), JSON
        elif i % 4 == 3:
            pixels = resizer(predictor.config)(Image.open(io.BytesIO(body)))
            body, kind = json.dumps({"array": normalise(pixels[None], predictor.config)[0].tolist()}).encode(), JSON
        requests.append((body, kind))
        expected.append(logits)
    # an answer that went to the wrong client would be seen
    assert not any(same_logits(a, b) for a, b in itertools.combinations(expected, 2))

    end = time.monotonic() + 60

    def client(body: bytes, kind: str) -> tuple[int, Any]:
        for tries in range(1, 5):
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, answer = server.ask("/classify?logits=true", body, kind, timeout=end - time.monotonic())
                if status == 200:
                    return tries, answer
                assert status >= 500, answer
            time.sleep(0.2 * 2**tries)
        pytest.fail("no answer in 4 tries")

    before = server.replicas()
    assert len(before) == 2
    victim, killed = min(before), threading.Event()

    def later(body: bytes, kind: str) -> tuple[int, Any]:
        assert killed.wait(60)
        return client(body, kind)

    with ThreadPoolExecutor(256) as pool:
        half: list[Future[tuple[int, Any]]] = [pool.submit(client, *request) for request in requests[:128]]
        rest = [pool.submit(later, *request) for request in requests[128:]]
        next(as_completed(half, timeout=60))
        os.kill(victim, signal.SIGKILL)
        killed.set()
    answers = [future.result() for future in (*half, *rest)]
    for (_, answer), logits in zip(answers, expected, strict=True):
        (image,) = answer["images"]
        assert same_logits(image["logits"], logits)
        odds = np.exp(logits.astype(np.float64))
        best = np.argsort(-odds)[:5]
        assert [entry["label"] for entry in image["top"]] == [predictor.labels[i] for i in best]  # type: ignore[index]
        found = [entry["probability"] for entry in image["top"]]
        np.testing.assert_allclose(found, odds[best] / odds.sum(), rtol=1e-3, atol=1e-6)
    sizes = [answer["images"][0]["batch_size"] for _, answer in answers]
    assert 1 < max(sizes) <= 16
    print(f"{sum(tries - 1 for tries, _ in answers)} retries, largest batch {max(sizes)}")
    eventually(lambda: len(server.replicas() - {victim}) == 2, "the dead replica to be replaced")


def test_several_images_in_one_request(server: Server, folder: Path) -> None:
    images = variants(7)
    status, answer = server.ask("/classify?k=2&logits=true", base64_json(*map(encoded, images)))
    assert status == 200
    expected = sdzoo.load_predictor(folder / "model.onnx")(images)
    assert len(answer["images"]) == 7
    for image, logits in zip(answer["images"], expected, strict=True):
        assert same_logits(image["logits"], logits) and len(image["top"]) == 2
    status, answer = server.ask("/classify", json.dumps({"array": np.zeros((3, 3, 32, 32)).tolist()}).encode())
    assert status == 200 and len(answer["images"]) == 3 and "logits" not in answer["images"][0]


def test_health(server: Server) -> None:
    expected = {"status": "ok", "model": "sd_resnet20", "tag": "cifar10_jpeg", "precision": "fp32"}
    assert server.ask("/health") == (200, expected)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims to be of a size and holds no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", size), (b"IDAT", bytes(64)))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def array_json(array: Any) -> bytes:
    return json.dumps({"array": array.tolist() if isinstance(array, np.ndarray) else array}).encode()


SMALL = encoded(Image.new("RGB", (32, 32)))
ONE = np.zeros((3, 32, 32))
BAD: dict[str, tuple[str, bytes | None, str, int, str]] = {
    "zero bytes": ("", b"", JPEG, 400, "body is empty"),
    "no picture": ("", b"hello", JPEG, 415, "neither JPEG nor PNG"),
    "another format": ("", encoded(Image.new("RGB", (32, 32)), "image/gif"), PNG, 415, "neither JPEG nor PNG"),
    "wrong type": ("", SMALL, "text/plain", 415, "content type 'text/plain'"),
    "cut short": ("", encoded(variants(1)[0], JPEG)[:800], JPEG, 400, "cannot be read"),
    "100 megapixels": ("", encoded(Image.new("1", (10_000, 10_000))), PNG, 400, "10000x10000"),
    "a bomb": ("", png_header(100_000, 100_000), PNG, 400, "cannot be read"),
    "too small": ("", encoded(Image.new("RGB", (7, 40))), PNG, 400, "at least 8x8"),
    "16 bits": ("", encoded(Image.new("I;16", (32, 32))), PNG, 400, "more than 8 bits"),
    "a large picture": ("", SMALL + bytes(8_388_608), PNG, 413, "at most 8388608"),
    "a large base64 picture": ("", base64_json(SMALL + bytes(8_388_608)), JSON, 413, "at most 8388608"),
    "a large body": ("", bytes(16_777_217), PNG, 413, "more than 16777216 bytes"),
    "broken JSON": ("", b'{"image": ', JSON, 400, "not JSON"),
    "deep JSON": ("", b"[" * 200_000, JSON, 400, "not JSON"),
    "JSON in Latin-1": ("", '{"ü": 1}'.encode("latin-1"), JSON, 400, "not JSON"),
    "a list": ("", b"[1, 2]", JSON, 400, "object of one field"),
    "an unknown field": ("", b'{"picture": ""}', JSON, 400, "object of one field"),
    "two fields": ("", b'{"image": "", "array": []}', JSON, 400, "object of one field"),
    "no base64": ("", b'{"image": "?"}', JSON, 400, "not valid base64"),
    "no ASCII": ("", '{"image": "é"}'.encode(), JSON, 400, "not valid base64"),
    "a number for a picture": ("", b'{"images": ["", 7]}', JSON, 400, "picture 1 is no base64"),
    "an empty picture": ("", b'{"images": [""]}', JSON, 415, "picture 0 is neither"),
    "no text": ("", b'{"image": 7}', JSON, 400, "no base64 text"),
    "no list": ("", b'{"images": "x"}', JSON, 400, "no list"),
    "no images": ("", b'{"images": []}', JSON, 400, "no list"),
    "60 megapixels together": (
        "",
        base64_json(*[encoded(Image.new("1", (5000, 6000)))] * 2),
        JSON,
        400,
        "picture 1 has 5000x6000 pixels; at most 20,000,000",
    ),
    "too many images": ("", base64_json(*[SMALL] * 33), JSON, 413, "33 images in one request; at most 32"),
    "too many arrays": ("", array_json(np.zeros((33, 3, 32, 32))), JSON, 413, "33 images in one request; at most 32"),
    "an empty batch": ("", array_json([]), JSON, 400, "shape (3, 32, 32)"),
    "another shape": ("", array_json(np.zeros((32, 32, 3))), JSON, 400, "array is (32, 32, 3)"),
    "ragged rows": ("", array_json([[1, 2], [3]]), JSON, 400, "no regular array of numbers"),
    "text in an array": ("", array_json(np.full((3, 32, 32), "1")), JSON, 400, "no regular array of numbers"),
    "not a number": ("", array_json(ONE * np.nan), JSON, 400, "not finite"),
    "beyond float32": ("", array_json(ONE + 1e39), JSON, 400, "not finite"),
    "k of 0": ("?k=0", SMALL, PNG, 400, "from 1 to 10"),
    "k of 11": ("?k=11", SMALL, PNG, 400, "from 1 to 10"),
    "k in words": ("?k=two", SMALL, PNG, 400, "k is 'two'"),
    "logits of 2": ("?logits=2", SMALL, PNG, 400, "true or false"),
    "a parameter": ("?top=2", SMALL, PNG, 400, "'top' is no parameter; known: k, logits"),
    "GET": ("", None, JSON, 405, "/classify takes POST"),
    "another path": ("/x", SMALL, PNG, 404, "known: GET /health, POST /classify"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_sentence_and_the_server_lives(server: Server, name: str) -> None:
    query, body, kind, wanted, words = BAD[name]
    before = server.replicas()
    status, answer = server.ask(f"/classify{query}", body, kind)
    assert (status, set(answer)) == (wanted, {"error"})
    assert words in answer["error"] and "\n" not in answer["error"]
    status, answer = server.ask("/classify?k=1", SMALL, PNG)
    assert status == 200 and len(answer["images"][0]["top"]) == 1
    assert server.replicas() == before


def test_everything_stays_on_this_machine(server: Server) -> None:
    ours = processes(server.home)
    assert {"gcs_server", "raylet"} <= {Path(command.split()[0]).name for command in ours.values()}
    if not shutil.which("ss"):
        pytest.skip("no ss (iproute2) to see the ports with")

    def addresses(options: str, column: int) -> set[str]:
        lines = subprocess.run(["ss", options], check=True, capture_output=True, text=True).stdout.splitlines()
        return {line.split()[column] for line in lines if ours.keys() & set(map(int, re.findall(r"pid=(\d+)", line)))}

    listening, peers = addresses("-Hltunp", 4), addresses("-Htunp", 5)
    assert f"127.0.0.1:{server.port}" in listening and peers
    local = re.compile(r"(127\.0\.0\.1|\[::ffff:127\.0\.0\.1\]|\[::1\]):")
    assert not [address for address in listening | peers if not local.match(address)]


def test_no_usage_statistics_and_no_dashboard(server: Server) -> None:
    said = [path.read_text() for path in server.home.glob("ray/session_2*/logs/dashboard.log")]
    assert ["Usage reporting is disabled" in text for text in said] == [True]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", 8265), timeout=5).close()


def can_trace() -> bool:
    strace = shutil.which("strace")
    return bool(strace) and subprocess.run([strace, "-o", os.devnull, "true"], check=False).returncode == 0


@pytest.fixture(scope="module")
def in_graph_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of one replica, which another may join, ended by SIGINT; its connections are written down."""
    work = tmp_path_factory.mktemp("in-graph")
    folder = export_folder(work / "exported", "in-graph")
    under = ("strace", "-D", "-f", "-qq", "-e", "trace=connect", "-o", str(work / "trace")) if can_trace() else ()
    quick = {"target_ongoing_requests": 2, "upscale_delay_s": 0, "metrics_interval_s": 0.5, "look_back_period_s": 2}
    with serving(folder, work, under, signal.SIGINT, min_replicas=1, **quick) as server:
        yield server


def test_in_graph_preprocessing(in_graph_server: Server, folder: Path) -> None:
    predictor = sdzoo.load_predictor(folder / "model.onnx")
    images = variants(3)
    pixels = np.stack([resizer(predictor.config)(image).transpose(1, 2, 0) for image in images])
    for body in (base64_json(*map(encoded, images)), array_json(pixels)):
        status, answer = in_graph_server.ask("/classify?logits=true", body)
        assert status == 200
        for image, logits in zip(answer["images"], predictor(images), strict=True):
            assert same_logits(image["logits"], logits)
    for array in (pixels[0] / 2, pixels[0].astype(int) + 256, pixels[0].astype(int) - 256):
        status, answer = in_graph_server.ask("/classify", array_json(array))
        assert status == 400 and "whole numbers from 0 to 255" in answer["error"]


def test_a_second_replica_under_load(in_graph_server: Server) -> None:
    assert len(in_graph_server.replicas()) == 1
    end = time.monotonic() + 90

    def client(body: bytes) -> None:
        while len(in_graph_server.replicas()) < 2 and time.monotonic() < end:
            for _ in range(10):
                assert in_graph_server.ask("/classify", body, PNG)[0] == 200

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, [SMALL] * 16))
    assert len(in_graph_server.replicas()) == 2


def test_nothing_outside_is_contacted(in_graph_server: Server) -> None:
    if not can_trace():
        pytest.skip("no strace to see connections with")
    assert in_graph_server.ask("/classify", SMALL, PNG)[0] == 200
    time.sleep(20)  # ONNX Runtime's telemetry waits some seconds
    trace = (in_graph_server.log.parent / "trace").read_text()
    called = set(re.findall(r'inet_(?:addr\(|pton\(AF_INET6, )"([^"]+)"', trace))
    assert "127.0.0.1" in called
    assert called <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def run_start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", str(KIT / "start.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_port_in_use_is_one_line(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run_start(str(folder), "--port", str(port))
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(rf"error: port {port} of 127.0.0.1 .*in use; choose another with --port\n", result.stderr)


def damaged(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "holds no card.json"),
    "damaged": (damaged, "model.onnx is damaged: its sha256"),
    "a file short": (lambda folder: (folder / "labels.json").unlink(), "labels.json is missing"),
    "an engine": (lambda folder: put_card(folder, file="labels.json"), "holds labels.json; this kit serves"),
    "no classifier": (without_classifier, "its model has no classifier"),
    "no sha256": (lambda folder: put_card(folder, files={}), "no sha256 of labels.json, model.onnx"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_folder_is_one_line(name: str, folder: Path, tmp_path: Path) -> None:
    spoil, words = WRONG[name]
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    spoil(spoilt)
    result = run_start(str(spoilt))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1


def test_the_cluster_exposes_no_dashboard() -> None:
    text = (KIT / "cluster.yaml").read_text()
    assert "Not run" in text
    config = yaml.safe_load(text)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    head, worker = [command for command in commands if "ray start" in command]
    assert "--include-dashboard=false" in head and "--disable-usage-stats" in head
    # without the token's file Ray then starts nothing; of itself it would let everybody in
    assert all(re.search(r"RAY_AUTH_MODE=token [^;]*bin/ray start", command) for command in (head, worker))
    check = "import sys, yaml; from ray.autoscaler._private.util import prepare_config, validate_config; "
    check += "validate_config(prepare_config(yaml.safe_load(sys.stdin)))"  # as `ray up` does
    result = subprocess.run([sys.executable, "-c", check], input=text, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_pictures_are_read_as_everywhere() -> None:
    assert (KIT / "pictures.py").read_bytes() == (KIT.parent / "onnxruntime" / "pictures.py").read_bytes()
