"""The browser kit: its server, its pictures.js against pictures.py, and the page in headless Chromium."""

from __future__ import annotations

import base64
import http.client
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from chromium import PROGRAM, Chromium
from exported import KITS, export_folder, load_file, not_finite, without_classifier
from numpy.typing import NDArray
from PIL import Image

from sdzoo.assets import pictures as demo_pictures

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, to compare with")
pytestmark = pytest.mark.skipif(not shutil.which("node") or not shutil.which("npm"), reason="needs node and npm")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs chromium (Debian: apt-get install chromium)")

UNREACHABLE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH")
pictures = load_file(KITS / "onnxruntime" / "pictures.py")
READY = "document.body.classList.contains('ready')"
ERROR = "!document.getElementById('error').hidden"
FIRST = "document.querySelector('#answers li span')?.textContent"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the kit, as a user has it after its first command. Read only."""
    brought = shutil.ignore_patterns("node_modules", "runtime")
    copy = shutil.copytree(KITS / "browser", tmp_path_factory.mktemp("kit") / "browser", ignore=brought)
    done = subprocess.run(["node", copy / "fetch.mjs"], capture_output=True, text=True, timeout=300)
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip("onnxruntime-web cannot be fetched: no package registry answers")
    assert done.returncode == 0, done.stderr
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported folder. Read only."""
    return export_folder(tmp_path_factory.mktemp("exported") / "folder")


@pytest.fixture(scope="module")
def in_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose graph takes uint8 pictures. Read only."""
    return export_folder(tmp_path_factory.mktemp("exported") / "in-graph", "in-graph")


@contextmanager
def served(kit: Path, folder: Path) -> Iterator[str]:
    """Serve ``folder`` with the kit's own server and yield the page's URL."""
    command = ["node", str(kit / "serve.mjs"), str(folder), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), url
            yield url
        finally:
            server.kill()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Return a browser; each test opens its own page in it."""
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        browser.size(1100, 800)
        yield browser


@pytest.fixture(scope="module")
def address(kit: Path, folder: Path) -> Iterator[str]:
    """Return where the page for ``folder`` is served."""
    with served(kit, folder) as url:
        yield url


@pytest.fixture
def page(chromium: Chromium, address: str) -> Chromium:
    """Return the browser with the page freshly opened and its model loaded."""
    chromium.open(address, READY)
    return chromium


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the exported folder, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "folder"))


def logits(folder: Path, picture: Path | bytes) -> NDArray[np.float32]:
    """Return what Python computes for a picture."""
    card = pictures.read_card(folder)
    session = onnxruntime.InferenceSession(folder / card["file"], providers=["CPUExecutionProvider"])
    array = pictures.to_array(pictures.open_picture(picture), card)
    return np.asarray(session.run(["logits"], {"images": array[None]})[0])[0]


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of random blocks: large differences, which a wrong resize would get wrong."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)[:height, :width])


def save(picture: Image.Image, path: Path) -> Path:
    picture.save(path)
    return path


# pictures.js against pictures.py, in node


RUN_CASES = """
import { readFileSync, writeFileSync } from "node:fs";
const { toArray } = await import(process.argv[1]);
for (const { file, width, height, config } of JSON.parse(readFileSync(0))) {
  const picture = { width, height, data: new Uint8ClampedArray(readFileSync(file)) };
  try {
    writeFileSync(`${file}.out`, new Uint8Array(toArray(picture, config).buffer));
  } catch (error) {
    console.log(error.message);
  }
}
"""


def in_node(cases: list[dict[str, Any]]) -> str:
    command = ["node", "--input-type=module", "-e", RUN_CASES, str(KITS / "browser" / "pictures.js")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "hamming", "box"])
def test_pixels_are_those_of_pillow(tmp_path: Path, interpolation: str) -> None:
    """Up to twice as tall as wide: beyond, Pillow's rounding depends on its version."""
    random = np.random.default_rng(0)
    cases, expected = [], []
    for index, where in enumerate(["client", "in-graph"] * 12):
        width = int(random.integers(20, 300))
        height = int(random.integers(8, 2 * width + 1))
        channels = 1 if index % 6 == 0 else 3
        size = [channels, 32, int(random.choice([32, 32, 40]))] if index % 4 else [channels, 224, 224]
        config = {"where": where, "input_size": size, "crop_pct": float(random.choice([0.875, 0.95, 1.0]))}
        config |= {"interpolation": interpolation, "crop_mode": "center"}
        config |= {"mean": [0.49, 0.48, 0.45][:channels], "std": [0.25, 0.24, 0.26][:channels]}
        image = noise(width, height, index)
        file = tmp_path / f"{index}"
        file.write_bytes(image.convert("RGBA").tobytes())
        cases.append({"file": str(file), "width": width, "height": height, "config": config})
        expected.append(pictures.to_array(image, {"preprocessing": config}))
    assert in_node(cases) == ""
    for case, array in zip(cases, expected, strict=True):
        got = np.fromfile(case["file"] + ".out", array.dtype).reshape(array.shape)
        np.testing.assert_array_equal(got, array, str(case))


@pytest.mark.parametrize(
    ("change", "said"), [({"interpolation": "nearest"}, '"nearest"'), ({"crop_mode": "squash"}, '"squash"')]
)
def test_resizing_that_the_page_does_not_know_is_refused(tmp_path: Path, change: dict[str, str], said: str) -> None:
    (tmp_path / "0").write_bytes(bytes(32 * 32 * 4))
    config = {"where": "client", "input_size": [3, 32, 32], "crop_pct": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}
    config |= {"interpolation": "bilinear", "crop_mode": "center"} | change
    assert said in in_node([{"file": str(tmp_path / "0"), "width": 32, "height": 32, "config": config}])


# the server


def request(url: str, path: str, method: str = "GET") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request(method, path)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


@pytest.mark.parametrize(
    ("path", "mime"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/runtime/ort-wasm-simd-threaded.mjs", "text/javascript; charset=utf-8"),
        ("/runtime/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("/model/card.json", "application/json"),
        ("/model/model.onnx", "application/octet-stream"),
    ],
)
def test_types_and_headers(address: str, path: str, mime: str) -> None:
    response = request(address, path)
    assert (response.status, response.headers["Content-Type"]) == (200, mime)
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        *("/absent.js", "/model/", "/README.md", "/demo", "/%", "/model/..%2fcard.json", "//", "/node_modules/x.js"),
        *("/..%2f..%2fetc/passwd", "/model/..%2f..%2f..%2fetc/hosts", "/%00.js", "/node_modules/long/package.json"),
        *("/serve.mjs", "/fetch.mjs", "/package.json", "/package-lock.json", "/model/secret.json", "/model/other.onnx"),
    ],
)
def test_nothing_else_is_served(address: str, folder: Path, path: str) -> None:
    for name in ("secret.json", "other.onnx"):
        (folder / name).touch()
    assert request(address, path).status == 404
    assert request(address, "/").status == 200


def test_files_beside_the_folder_are_not_served(kit: Path, own_folder: Path) -> None:
    (own_folder.parent / "folder-secret.json").write_text("{}")
    with served(kit, own_folder) as url:
        for path in ("/model/..%2ffolder-secret.json", "/model/../folder-secret.json", "/model-secret.json"):
            assert request(url, path).status == 404


def test_only_reading(address: str) -> None:
    assert request(address, "/", "POST").status == 405
    assert request(address, "/", "HEAD").status == 200


def server_refuses(kit: Path, *arguments: str | Path) -> str:
    done = subprocess.run(["node", kit / "serve.mjs", *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_server_without_an_exported_folder(kit: Path, folder: Path, tmp_path: Path) -> None:
    assert "name the folder" in server_refuses(kit)
    assert "holds no card.json" in server_refuses(kit, tmp_path)
    assert "the port is x" in server_refuses(kit, folder, "x")
    assert "run: node fetch.mjs" in server_refuses(KITS / "browser", folder)


def test_server_on_a_port_in_use(kit: Path, folder: Path, address: str) -> None:
    port = str(urlsplit(address).port)
    assert f"port {port} is in use" in server_refuses(kit, folder, port)


# the page


def page_logits(page: Chromium, contents: list[bytes]) -> NDArray[np.float64]:
    files = json.dumps([base64.b64encode(content).decode() for content in contents])
    return np.array(
        page.evaluate(
            f"""(async () => {{
              const {{ loadModel }} = await import("/classifier.js");
              const model = await loadModel("/model/");
              const all = [];
              for (const content of {files}) {{
                const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
                all.push(Array.from((await model.logits(new File([bytes], "x.png"))).logits));
              }}
              return all;
            }})()"""
        )
    )


@needs_chromium
@pytest.mark.parametrize("where", ["client", "in-graph"])
def test_logits_of_png_pictures_are_pythons(chromium: Chromium, kit: Path, where: str, request: Any) -> None:
    """At the input's size, and larger, opaque and grey ones, which the page resizes and converts itself."""
    exported = request.getfixturevalue("folder" if where == "client" else "in_graph")
    contents = [png(Image.open(file)) for file in demo_pictures().values()]
    contents += [png(noise(300, 200)), png(noise(90, 170)), png(noise(64, 64).convert("L"))]
    contents += [png(noise(64, 64).convert("RGBA")), png(noise(64, 64).quantize(200))]
    with served(kit, exported) as url:
        chromium.open(url, READY)
        got = page_logits(chromium, contents)
    np.testing.assert_allclose(got, [logits(exported, content) for content in contents], rtol=0, atol=1e-3)


@needs_chromium
def test_demo_pictures_have_pythons_top1_and_the_page_asks_no_other_server(
    page: Chromium, folder: Path, address: str, tmp_path: Path
) -> None:
    labels = json.loads((folder / "labels.json").read_text())
    for name, file in demo_pictures().items():
        expected = pictures.softmax(logits(folder, file))
        page.evaluate(f"document.querySelector('button[value={name}]').click()")
        page.wait(f"document.getElementById('status').textContent.startsWith('{name}.jpg, computed in ')")
        shown = page.evaluate("[...document.querySelectorAll('#answers li')].map((li) => li.innerText.split(/\\s+/))")
        assert len(shown) == 5
        assert shown[0][0] == labels[int(expected.argmax())]
        # a JPEG decoder may round otherwise: a point of percent
        assert float(shown[0][1].rstrip("%")) == pytest.approx(100 * expected.max(), abs=1)
        assert page.evaluate("document.getElementById('status').textContent").endswith(" ms")
    assert {
        urlsplit(url)._replace(path="/").geturl() for url in page.requested if url[:5] not in ("blob:", "data:")
    } == {address}
    assert any(url.endswith(".wasm") for url in page.requested)
    assert page.errors == []
    print(page.screenshot(tmp_path / "page.png"))


@needs_chromium
def test_page_can_reach_no_other_server(page: Chromium) -> None:
    """Its Content-Security-Policy forbids that even to code that tries, and to the own server by another name."""
    port = page.evaluate("location.port")
    for url in ("https://example.com/", f"http://localhost:{port}/"):
        assert page.evaluate(f"fetch('{url}', {{mode: 'no-cors'}}).then(() => 'sent', (e) => e.name)") == "TypeError"
    assert sum("Content Security Policy" in error for error in page.errors) >= 2


@needs_chromium
def test_picture_chosen_or_dropped(page: Chromium, tmp_path: Path) -> None:
    files = demo_pictures()
    page.choose("#file", files["cat"])
    page.wait(f"{FIRST} === 'cat'")
    page.drop(save(Image.open(files["truck"]), tmp_path / "truck.png"), 50, 50)
    page.wait(f"{FIRST} === 'truck'")
    assert page.evaluate("document.getElementById('picture').alt") == "truck.png"
    assert page.errors == []


@needs_chromium
def test_pictures_given_at_once_are_taken_in_turn(page: Chromium) -> None:
    page.evaluate(
        """window.said = [];
        new MutationObserver((records) => said.push(...records.flatMap((r) => [...r.addedNodes].map((n) => n.data))))
          .observe(document.getElementById("status"), { childList: true });
        document.querySelectorAll("#demos button").forEach((button) => button.click())"""
    )
    page.wait("document.getElementById('status').textContent.startsWith('truck.jpg, computed in ')")
    said = page.evaluate("said.map((text) => text.replace(/[0-9.]+ ms/, 'time'))")
    names = [f"{name}.jpg" for name in demo_pictures()]
    assert said == [text for name in names for text in (f"Looking at {name} …", f"{name}, computed in time")]
    assert page.errors == []


def spoiled(kind: str, folder: Path) -> tuple[str, bytes]:
    if kind == "100 megapixels":
        return "large.png", png(Image.new("1", (10_000, 10_000)))
    if kind == "7 pixels":
        return "small.png", png(Image.new("RGB", (7, 40)))
    if kind == "damaged":
        return "damaged.png", png(noise(64, 64))[:60] + bytes(40)
    if kind == "nearly opaque":
        image = noise(64, 64).convert("RGBA")
        image.putpixel((63, 63), (9, 9, 9, 254))
        return "glass.png", png(image)
    if kind == "a colour that is transparent":
        image = noise(64, 64).quantize(200)
        content = io.BytesIO()
        image.save(content, "PNG", transparency=image.getpixel((0, 0)))
        return "keyed.png", content.getvalue()
    if kind == "16 bits":
        return "deep.png", png(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)))
    return {"empty": ("empty.png", b""), "text": ("notes.txt", b"A text is no picture.")}[kind]


@needs_chromium
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "empty.png is not a picture"),
        ("text", "notes.txt is not a picture"),
        ("100 megapixels", "large.png has 10000x10000 pixels; at most 64 million"),
        ("7 pixels", "small.png has 7x40 pixels; at least 8x8"),
        ("damaged", "damaged.png "),
        ("nearly opaque", "glass.png is transparent in places; save it without transparency first"),
        ("a colour that is transparent", "keyed.png is transparent in places"),
        ("16 bits", "deep.png has more than 8 bits a channel; scale it to 8 first"),
    ],
)
def test_file_that_is_no_usable_picture(page: Chromium, tmp_path: Path, folder: Path, kind: str, said: str) -> None:
    name, content = spoiled(kind, folder)
    (tmp_path / name).write_bytes(content)
    page.choose("#file", tmp_path / name)
    page.wait(ERROR)
    assert said in page.evaluate("document.getElementById('error').textContent")
    page.choose("#file", demo_pictures()["ship"])  # and the page goes on
    page.wait(f"{FIRST} === 'ship'")
    assert page.evaluate("document.getElementById('error').hidden")


@needs_chromium
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("card.json", None, "There is no model here: model/card.json was not found (404)"),
        ("card.json", b"{", "card.json is damaged"),
        ("card.json", b"{}", 'card.json is not of the format "sdzoo-2"'),
        ("card.json", b"null", 'card.json is not of the format "sdzoo-2"'),
        ("card.json", b'{"format": "sdzoo-2"}', "card.json is damaged: its sha256 is not the seal in it"),
        ("model.onnx", None, "model/model.onnx was not found (404)"),
        ("model.onnx", b"x", "model.onnx is damaged: its sha256 is not the one in card.json"),
        ("labels.json", b"[]", "labels.json is damaged: its sha256 is not the one in card.json"),
    ],
)
def test_model_that_is_missing_or_damaged(
    chromium: Chromium, kit: Path, own_folder: Path, file: str, content: bytes | None, said: str
) -> None:
    with served(kit, own_folder) as url:
        if content is None:
            (own_folder / file).unlink()
        else:
            (own_folder / file).write_bytes(content)
        chromium.open(url, ERROR)
        assert said in chromium.evaluate("document.getElementById('error').textContent")


@needs_chromium
def test_card_that_was_changed(chromium: Chromium, kit: Path, own_folder: Path) -> None:
    text = (own_folder / "card.json").read_text()
    (own_folder / "card.json").write_text(text.replace("0.4914", "4.4914"))
    with served(kit, own_folder) as url:
        chromium.open(url, ERROR)
        said = chromium.evaluate("document.getElementById('error').textContent")
    assert said == "card.json is damaged: its sha256 is not the seal in it."


@needs_chromium
def test_model_without_classifier(chromium: Chromium, kit: Path, tmp_path: Path) -> None:
    with served(kit, without_classifier(tmp_path / "out")) as url:
        chromium.open(url, ERROR)
        assert "has no classifier" in chromium.evaluate("document.getElementById('error').textContent")


@needs_chromium
def test_values_that_are_not_finite(chromium: Chromium, kit: Path, own_folder: Path) -> None:
    with served(kit, not_finite(own_folder)) as url:
        chromium.open(url, READY)
        chromium.evaluate("document.querySelector('button[value=cat]').click()")
        chromium.wait(ERROR)
        assert "values that are not finite" in chromium.evaluate("document.getElementById('error').textContent")


@needs_chromium
@pytest.mark.parametrize("name", ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm"])
def test_runtime_that_does_not_start(chromium: Chromium, kit: Path, folder: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(kit, tmp_path / "kit", ignore=shutil.ignore_patterns("node_modules")))
    (copy / "runtime" / name).unlink()
    with served(copy, folder) as url:
        chromium.open(url, ERROR)
        said = chromium.evaluate("document.getElementById('error').textContent")
    assert said.startswith("The model cannot be run: ")
    assert "node fetch.mjs" in said


@needs_chromium
def test_keyboard_alone(page: Chromium) -> None:
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.press("Tab")
    assert page.evaluate("document.activeElement.value") == "airplane"
    page.press("Tab")
    page.press("Enter")
    page.wait(f"{FIRST} === 'automobile'")


@needs_chromium
@pytest.mark.parametrize(
    ("width", "height", "dark"), [(1100, 800, False), (1100, 800, True), (375, 812, False), (320, 568, True)]
)
def test_page_fits_the_screen(page: Chromium, tmp_path: Path, width: int, height: int, dark: bool) -> None:
    try:
        page.size(width, height, dark)
        page.evaluate("document.querySelector('button[value=cat]').click()")
        page.wait(f"{FIRST} === 'cat'")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        print(page.screenshot(tmp_path / f"page-{width}.png"))
    finally:
        page.size(1100, 800)
