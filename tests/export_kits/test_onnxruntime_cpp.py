"""The C++ of the onnxruntime kit, built and run, with the library of libonnxruntime-dev or of the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from exported import KITS, export_folder, load_file, not_finite
from PIL import Image

from sdzoo.assets import pictures as demo_pictures

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, to compare with")
KIT = KITS / "onnxruntime"
pictures = load_file(KIT / "pictures.py")
INSTALLED = Path("/usr/include/onnxruntime/onnxruntime_cxx_api.h").exists()
# Where the headers alone were unpacked, on a system that does not have the package.
HEADERS = os.environ.get("SDZOO_ONNXRUNTIME_HEADERS")
WHEEL = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))

pytestmark = [
    pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="needs cmake and a C++ compiler"),
    pytest.mark.skipif(
        not INSTALLED and not (HEADERS and WHEEL),
        reason="needs libonnxruntime-dev, or its headers in the folder SDZOO_ONNXRUNTIME_HEADERS and a wheel's library",
    ),
    pytest.mark.skipif(not Path("/usr/include/stb/stb_image.h").exists(), reason="needs libstb-dev"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program, built without a warning."""
    prefix, build = tmp_path_factory.mktemp("prefix"), tmp_path_factory.mktemp("build")
    if not INSTALLED:
        (prefix / "include").symlink_to(str(HEADERS))
        (prefix / "lib").mkdir()
        for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
            (prefix / "lib" / name).symlink_to(WHEEL[-1])
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"]
    for command in (["-S", str(KIT / "cpp"), "-B", str(build), *options], ["--build", str(build)]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "classify"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose graph takes uint8 pictures. Read only."""
    return export_folder(tmp_path_factory.mktemp("exported") / "folder", "in-graph")


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)


def refused(program: Path, *arguments: str | Path) -> str:
    done = run(program, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("name", sorted(demo_pictures()))
def test_five_best_labels_are_pythons(program: Path, folder: Path, tmp_path: Path, name: str) -> None:
    picture = tmp_path / "picture.png"
    Image.open(demo_pictures()[name]).save(picture)
    card = pictures.read_card(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    batch = pictures.to_array(pictures.open_picture(picture), card)[np.newaxis]
    expected = pictures.softmax(np.asarray(session.run(["logits"], {"images": batch})[0])[0])
    done = run(program, folder, picture)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    best = np.argsort(-expected, kind="stable")[:5]
    assert [label for _, label in lines] == [card["labels"][index] for index in best]
    for (percent, _), index in zip(lines, best, strict=True):
        assert float(percent.rstrip("%")) == pytest.approx(100 * expected[index], abs=0.051)


def test_wrong_input(program: Path, folder: Path, tmp_path: Path) -> None:
    assert "usage: classify FOLDER PICTURE" in refused(program, folder)
    assert "name a folder that sdzoo export wrote" in refused(program, tmp_path, "x.png")
    assert "absent.png is not a picture" in refused(program, folder, "absent.png")
    (tmp_path / "x.png").write_bytes(b"")
    assert "x.png is not a picture" in refused(program, folder, tmp_path / "x.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    assert "large.png is 10000x10000; the model takes 32x32" in refused(program, folder, tmp_path / "large.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:50])
    assert "cut.png cannot be decoded" in refused(program, folder, tmp_path / "cut.png")


def test_model_that_it_cannot_run(program: Path, folder: Path, tmp_path: Path) -> None:
    client = export_folder(tmp_path / "client")
    assert "export it with --preprocess in-graph" in refused(program, client, demo_pictures()["cat"])
    broken = not_finite(Path(shutil.copytree(folder, tmp_path / "broken")))
    assert "values that are not finite" in refused(program, broken, demo_pictures()["cat"])
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:1000])
    refused(program, damaged, demo_pictures()["cat"])
    (damaged / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    (damaged / "labels.json").write_text('["one", "two"]')
    assert "one label a class" in refused(program, damaged, demo_pictures()["cat"])
