"""A Hub for a test: huggingface_hub's real client in this process, and the server of hub_server.py."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
from hub_server import HubServer
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from small_run import train_small
from timm.models import save_for_hf

import sdzoo  # noqa: F401  registers the models
from sdzoo.hub.layout import MODEL, write_sums
from sdzoo.training.checkpoint import describe, save_weights


def pytest_configure(config: pytest.Config) -> None:
    """Let the client upload in the way that its HTTP library would rather not see any more."""
    config.addinivalue_line("filterwarnings", "ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return the folder that the client of the test caches in."""
    return tmp_path / "hub_cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Return a Hub that this process's client takes for the public one; nobody is logged in, nothing is cached.

    To log in: ``monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)``.
    """
    server = HubServer()
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        *(name for name in os.environ if name.lower().endswith("_proxy")),
    ):
        monkeypatch.delenv(name, raising=False)
    # the client has read its environment when it was imported
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    # where older versions have a copy of it
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE, False)
    # it waits a second and more before it tries again
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run that is done. Read only."""
    return train_small(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of ``finished_run``."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as it is published, of the bundled weights. Not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    model = timm.create_model("sd_resnet20.cifar10_jpeg", pretrained=True)
    description = describe(model, tuple(model.pretrained_cfg["label_names"]))  # type: ignore[index]
    arguments = {name: description[name] for name in ("num_classes", "in_chans", "mode")}
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    save_weights(folder / MODEL, model, description | {"model_kwargs": {"global_pool": "avg"}})  # as timm writes
    write_sums(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """Return a copy of the published folder."""
    return Path(shutil.copytree(published, tmp_path / "folder"))
