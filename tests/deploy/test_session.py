from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from samples import FILES, equal, normalised

from sdzoo.deploy.predictor import Predictor
from sdzoo.deploy.runtime import load_predictor
from sdzoo.errors import InputError

EXACT_CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})  # TF32, its default, does not hold the limit


class Sessions:
    """Stands for onnxruntime.InferenceSession: notes what was asked for; ``runs`` is the provider it claims to run."""

    def __init__(self, runs: str | None = None) -> None:
        self.create, self.runs = onnxruntime.InferenceSession, runs
        self.options: list[onnxruntime.SessionOptions] = []
        self.providers: list[list[str]] = []

    def __call__(self, path: str, options: onnxruntime.SessionOptions, providers: list[str], **_: Any) -> Any:
        self.options.append(options)
        self.providers.append(providers)
        session = self.create(path, providers=["CPUExecutionProvider"])
        if runs := self.runs:
            session.get_providers = lambda: [runs, "CPUExecutionProvider"]
        return session


def install(monkeypatch: pytest.MonkeyPatch, compiled: list[str], runs: str | None = None) -> Sessions:
    sessions = Sessions(runs)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: compiled)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda *_, **__: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", sessions)
    return sessions


@pytest.mark.parametrize("provider", ["auto", "cpu", "CPUExecutionProvider"])
def test_the_provider_that_runs_is_named(exported: Path, provider: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_predictor(exported, provider).provider == "CPUExecutionProvider"


def test_the_torch_predictor_names_its_device(torch_predictor: Predictor) -> None:
    assert torch_predictor.provider == "PyTorch cpu"


@pytest.mark.parametrize(
    ("provider", "says"),
    [
        ("cdua", 'provider "cdua" is unknown; known: auto, cpu, cuda, tensorrt; nearest: cuda'),
        ("CUDAExecutionProvidr", "nearest: CUDAExecutionProvider"),
        ("", "known: auto, cpu, cuda, tensorrt"),
        ("AUTO", "known: auto"),
    ],
)
def test_unknown_providers(exported: Path, provider: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_predictor(exported, provider)
    assert says in str(caught.value)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "CUDAExecutionProvider"])
def test_providers_that_are_not_installed(exported: Path, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    sessions = install(monkeypatch, ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="is not in the installed onnxruntime; it has CPUExecutionProvider"):
        load_predictor(exported, provider)
    assert sessions.providers == []


@pytest.mark.parametrize(
    ("provider", "name"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_named_provider_that_falls_back_in_silence_is_an_error(
    exported: Path, monkeypatch: pytest.MonkeyPatch, provider: str, name: str
) -> None:
    sessions = install(monkeypatch, [name, "CPUExecutionProvider"])
    with pytest.raises(InputError, match=f"asked for {name}, but this machine can only run CPUExecutionProvider"):
        load_predictor(exported, provider)
    assert sessions.providers == [[EXACT_CUDA if provider == "cuda" else name]]
    assert sessions.options[0].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_a_named_provider_that_runs_is_the_only_one_listed(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = install(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")
    assert load_predictor(exported, "cuda").provider == "CUDAExecutionProvider"
    assert sessions.providers == [[EXACT_CUDA]]


def test_auto_takes_cuda_where_it_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = install(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")
    assert load_predictor(exported).provider == "CUDAExecutionProvider"
    assert sessions.providers == [[EXACT_CUDA, "CPUExecutionProvider"]]


def test_auto_warns_where_cuda_was_installed_but_does_not_run(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.warns(
        UserWarning, match="CUDAExecutionProvider is installed but .* using CPUExecutionProvider"
    ) as seen:
        predictor = load_predictor(exported)
    assert predictor.provider == "CPUExecutionProvider"
    assert seen[0].filename == __file__


def test_threads_reach_onnxruntime(exported: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    equal(predictor(normalised(FILES[0])), load_predictor(exported, threads=1)(FILES[0]))
    sessions = install(monkeypatch, ["CPUExecutionProvider"])
    load_predictor(exported, threads=2)
    load_predictor(exported)
    assert [options.intra_op_num_threads for options in sessions.options] == [2, 0]


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_that_no_machine_has_are_refused(exported: Path, threads: int) -> None:
    with pytest.raises(InputError, match=f"threads is {threads}"):
        load_predictor(exported, threads=threads)


def test_missing_extra_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    with pytest.raises(ImportError, match=r'onnxruntime not installed.*"sdzoo\[onnx\]"'):
        load_predictor(exported)
