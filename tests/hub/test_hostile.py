"""A stranger's repository: whatever it holds, it is refused before it is believed, and no pickle is ever opened."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_server import HubServer, _Handler
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdzoo.digest import file_sha256
from sdzoo.errors import InputError
from sdzoo.hub.cache import download
from sdzoo.hub.layout import CONFIG, MODEL, SUMS, write_sums
from sdzoo.hub.load import MAX_HEADER_BYTES, load_hub, open_hub, verify_hub
from sdzoo.hub.model_config import MAX_CONFIG_BYTES, read_model_config
from sdzoo.hub.remote import HubError
from sdzoo.weights import published as registry

REPO = "org/net"
Edit = Callable[[dict[str, Any]], object]


def edited(folder: Path, edit: Edit) -> bytes:
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    return json.dumps(config).encode()


def cfg(name: str, value: Any) -> Edit:
    return lambda config: config["pretrained_cfg"].update({name: value})


def args(**values: Any) -> Edit:
    return lambda config: config["model_args"].update(values)


def top(**values: Any) -> Edit:
    return lambda config: config.update(values)


WRONG: dict[str, tuple[Edit, str]] = {
    "of timm, not of sdzoo": (top(architecture="resnet50"), '"resnet50" is not a model'),
    "code as a name": (top(architecture="os.system"), "architecture is 'os.system', not the name"),
    "a name that clears the screen": (top(architecture="\x1b[2J"), r"architecture is '\\x1b\[2J'"),
    "no name": (lambda config: config.pop("architecture"), "architecture is 'None'"),
    "a list as a name": (top(architecture=["sd_resnet20"]), "not the name of a model"),
    "a billion classes": (top(num_classes=10**9), "num_classes is '1000000000' and '10'"),
    "a billion classes everywhere": (
        lambda config: (
            [place.update(num_classes=10**9) for place in (config, config["pretrained_cfg"], config["model_args"])]
            and config["pretrained_cfg"].pop("label_names")
        ),
        "num_classes is '1000000000'",
    ),
    "true classes": (top(num_classes=True), "num_classes is 'True'"),
    "no classes said": (
        lambda config: [place.pop("num_classes") for place in (config, config["pretrained_cfg"], config["model_args"])],
        "num_classes is not said",
    ),
    "classes in contradiction": (args(num_classes=9), "num_classes is '10' and '10' and '9'"),
    "channels in contradiction": (args(in_chans=1), "in_chans is '3' and '1'"),
    "a key unknown": (top(auto_map={"AutoModel": "evil.Model"}), "'auto_map' is not known"),
    "a source of weights": (cfg("file", "/etc/passwd"), "pretrained_cfg.'file' is not known"),
    "an address": (cfg("url", "http://evil"), "pretrained_cfg.'url' is not known"),
    "another repository": (cfg("hf_hub_id", "evil/net"), "pretrained_cfg.'hf_hub_id' is not known"),
    "a loader of its own": (cfg("custom_load", True), "custom_load is set"),
    "an argument unknown": (args(checkpoint_path="evil.pth"), "model_args.'checkpoint_path' is not known"),
    "a key that clears the screen": (top(**{"\x1b[2J": 1}), r"'\\x1b\[2J' is not known"),
    "huge widths": (args(widths=[10**9] * 3), "model_kwargs is"),
    "a huge picture": (cfg("input_size", [3, 10**9, 10**9]), "input_size is"),
    "a picture of text": (cfg("input_size", "3x32"), "input_size is"),
    "no deviation": (cfg("std", [0, 0, 0]), "std is"),
    "a mean of text": (cfg("mean", ["a", "b", "c"]), "mean is"),
    "a mean beyond floats": (cfg("mean", [1e308 * 10, 0, 0]), "Infinity is no number"),
    "another crop": (cfg("crop_mode", "squash"), "crop_mode is 'squash'"),
    "another mode": (args(mode="evil"), "mode is 'evil'"),
    "labels of another number": (cfg("label_names", ["a"]), "labels is"),
    "labels that clear the screen": (cfg("label_names", ["\x1b[2J"] * 10), "label_names is .*, not a list of names"),
    "labels by number": (cfg("label_names", {"0": "a"}), "label_names is .*, not a list of names"),
    "deep": (cfg("notes", [[["a"]]]), "notes is .*, not a plain value"),
    "no mapping inside": (top(pretrained_cfg=[]), r"pretrained_cfg is '\[\]', not a mapping"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_hostile_configuration_is_refused(case: str, published: Path) -> None:
    edit, said = WRONG[case]
    with pytest.raises(InputError, match=said) as caught:
        read_model_config(edited(published, edit))
    assert str(caught.value).startswith("config.json: ") and str(caught.value).isprintable()


NO_JSON = (b"", b"[]", b"null", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' * 100_000)
NO_NUMBERS = (b'{"a": NaN}', b'{"a": ' + b"9" * 5000 + b"}")


@pytest.mark.parametrize("content", [*NO_JSON, *NO_NUMBERS, b" " * (MAX_CONFIG_BYTES + 1)])
def test_what_is_no_configuration_is_refused(content: bytes) -> None:
    with pytest.raises(InputError, match=r"^config\.json: "):
        read_model_config(content)


def test_a_key_that_stands_twice_is_refused(published: Path) -> None:
    content = (
        (published / CONFIG).read_bytes().replace(b'"num_features"', b'"architecture": "sd_resnet20", "num_features"')
    )
    with pytest.raises(InputError, match="a key stands in it twice"):
        read_model_config(content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10, 3, 10**12]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_refused(data: st.DataObject, published: Path) -> None:
    config = json.loads((published / CONFIG).read_text())
    place = data.draw(st.sampled_from([config, config["pretrained_cfg"], config["model_args"]]))
    extra = ["label_names", "label_descriptions", "mode", "widths", "block_args", "schedule", "drop_path_rate"]
    place[data.draw(st.sampled_from([*place, *extra]))] = data.draw(VALUES)
    with contextlib.suppress(InputError):
        description = read_model_config(json.dumps(config).encode())
        assert description["arch"] == "sd_resnet20" and description["num_classes"] == 10


def test_the_configuration_of_a_grey_network_of_other_build() -> None:
    config = {
        "architecture": "sd_resnet20",
        "num_classes": 2,
        "model_args": {"in_chans": 1, "shortcut": "subsample", "drop_path_rate": 0.3, "mode": "sample"},
        "pretrained_cfg": {"input_size": [1, 28, 28], "mean": [0.5], "std": [0.25], "tag": "x", "license": None},
        "label_names": ["no", "yes"],
        "label_descriptions": {"no": "not so"},
    }
    assert read_model_config(json.dumps(config).encode()) == {
        "arch": "sd_resnet20",
        "num_classes": 2,
        "in_chans": 1,
        "model_kwargs": {"shortcut": "subsample"},
        "mode": "sample",
        "input_size": [1, 28, 28],
        "mean": [0.5],
        "std": [0.25],
        "labels": ["no", "yes"],
    }


def test_nothing_else_is_fetched_for_a_bad_configuration(hub: HubServer, folder: Path) -> None:
    (folder / CONFIG).write_bytes(edited(folder, top(architecture="resnet50")))
    write_sums(folder)
    hub.add(REPO, folder)
    with pytest.raises(InputError, match=r'org/net@.*: config.json: "resnet50" is not a model'):
        load_hub(REPO)
    assert hub.ranges == []


def test_a_model_beyond_any_limit_is_not_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdzoo.hub.load.MAX_FILE_BYTES", 1000)
    with pytest.raises(InputError, match=r"model\.safetensors of .* bytes; at most 1,000"):
        load_hub(folder)


@pytest.mark.parametrize(("name", "size"), [(CONFIG, MAX_CONFIG_BYTES + 1), (SUMS, 32_769), (MODEL, 40_000_000)])
def test_what_is_too_large_is_not_fetched(name: str, size: int, hub: HubServer, folder: Path, cache: Path) -> None:
    (folder / name).write_bytes(b"\0" * size)
    hub.add(REPO, folder)
    with pytest.raises(InputError, match=f"{name} of org/net.* has {size:,} bytes; at most"):
        load_hub(REPO)
    with pytest.raises(InputError, match=f"{name} of .* has {size:,} bytes; at most"):
        load_hub(folder)
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 20_000


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize("path", ["/{}", "../../../{}", "../../../../x", "..", ".hidden"])
def test_what_a_server_calls_a_file_is_no_path(
    header: str, path: str, hub: HubServer, folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (victim := tmp_path / "victim").write_text("precious")
    hub.add(REPO, folder)
    hub.headers = {header: f'"{path.format(str(victim)[1:] if path[0] == "/" else victim.name)}"'}
    before = {file for file in tmp_path.rglob("*") if cache not in (file, *file.parents)}
    open_hub(REPO)
    verify_hub(REPO)
    assert victim.read_text() == "precious"
    assert before == {file for file in tmp_path.rglob("*") if cache not in (file, *file.parents)}
    assert {file.parent.name for file in cache.rglob("*") if file.is_file()} == {
        hub.repos[REPO].branches["main"],
        "refs",
    }


@pytest.mark.parametrize("known", [False, True])
def test_another_commit_than_was_asked_for_is_refused(
    known: bool, hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = hub.add(REPO, folder).branches["main"]
    open_hub(f"{REPO}@{asked.upper()}")  # as it should be, and cached
    other = hub.repos[REPO].commit({file.name: file.read_bytes() for file in folder.iterdir()})
    hub.lies["info"] = lambda answer: answer | {"sha": other}
    if known:
        monkeypatch.setattr(registry, "PUBLISHED", (registry.Published(REPO, asked, file_sha256(folder / MODEL)),))
    for read in (open_hub, verify_hub):
        with pytest.raises(InputError, match=f"{REPO}@{asked} was asked for, and .* answered with commit {other}"):
            read(REPO if known else f"{REPO}@{asked}")


@pytest.mark.parametrize("name", [CONFIG, SUMS, MODEL])
def test_never_more_is_written_than_was_promised(name: str, hub: HubServer, folder: Path, cache: Path) -> None:
    hub.add(REPO, folder)
    hub.repos[REPO].commits[hub.repos[REPO].branches["main"]][name] += b" " * 30_000_000

    def small(answer: Any) -> Any:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        return answer | {"siblings": [{"rfilename": n, "size": size} for n, size in sizes.items()]}

    hub.lies["info"] = small
    with pytest.raises(HubError, match=f"{name} of org/net@.* has more bytes than the [0-9,]+ that the Hub promised"):
        open_hub(REPO)
    assert not list(cache.rglob(name)) and not list(cache.rglob("incomplete-*"))


def edit_info(**values: Any) -> Callable[[Any], Any]:
    return lambda answer: answer | values


MALFORMED: dict[str, Callable[[Any], Any]] = {
    "HTML": lambda answer: b"<html>please log in</html>",
    "nothing": lambda answer: b"",
    "a list": lambda answer: b"[]",
    "null": lambda answer: b"null",
    "depth": lambda answer: b"[" * 200_000,
    "no commit": edit_info(sha=None),
    "a path for a commit": edit_info(sha="../../../../evil"),
    "a short commit": edit_info(sha="abc"),
    "a list for a commit": edit_info(sha=["a"]),
    "no list of files": edit_info(siblings=3),
    "files without names": edit_info(siblings=[{}]),
    "a number for a name": edit_info(siblings=[{"rfilename": 3, "size": 1}]),
    "a text for a size": edit_info(siblings=[{"rfilename": CONFIG, "size": "abc"}]),
    "a size below nothing": edit_info(siblings=[{"rfilename": CONFIG, "size": -1}]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_no_hub_answers_is_said_in_one_line_and_the_cache_is_tried(
    case: str, hub: HubServer, folder: Path, cache: Path
) -> None:
    hub.add(REPO, folder)
    hub.lies["info"] = MALFORMED[case]
    said = r"did not answer as a Hub does, or something between did \(.*\); .* is not in the cache"
    with pytest.raises(HubError, match=said) as caught:
        open_hub(REPO)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700 and not cache.exists()
    del hub.lies["info"]
    open_hub(REPO)
    hub.lies["info"] = MALFORMED[case]
    assert open_hub(REPO)[1].cached


def test_a_page_instead_of_a_file_is_refused(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, folder)
    monkeypatch.setattr(_Handler, "_resolve", lambda self, body, **given: b"<html>")
    with pytest.raises(HubError, match="Consistency check failed: file should be of size"):
        open_hub(REPO)


@pytest.mark.parametrize("revision", ["v1.0", "main"])
def test_what_was_noted_in_the_cache_is_a_commit_or_nothing(
    revision: str, hub: HubServer, folder: Path, cache: Path
) -> None:
    held = hub.add(REPO, folder)
    held.tags["v1.0"] = held.branches["main"]
    open_hub(f"{REPO}@{revision}")
    (snapshot,) = cache.rglob("snapshots/*")
    snapshot.rename(snapshot.with_name("evil"))
    (ref,) = cache.rglob("refs/*")
    ref.write_text("evil")
    hub.close()
    with pytest.raises(HubError, match="is not in the cache"):
        open_hub(f"{REPO}@{revision}")


def test_names_that_clear_the_screen_do_not(hub: HubServer, folder: Path) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.add(REPO, files | {f"\x1b[2J{'x' * 300}{number}": b"" for number in range(90)})
    with pytest.raises(InputError, match=r"not in SHA256SUMS: \\x1b\[2Jx+\.\.\., .* and 80 more") as caught:
        verify_hub(REPO)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


def test_a_digest_that_clears_the_screen_does_not(folder: Path) -> None:
    rewritten(folder, lambda state: None, {"arch": "sd_resnet20", "state_sha256": "\x1b[2J" + "x" * 100_000})
    with pytest.raises(InputError, match="is damaged: sha256 of the weights") as caught:
        open_hub(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def framed(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


BROKEN = {
    "a header beyond memory": (framed(b"{}", 2**63), "its header claims 9,223,372,036,854,775,808 bytes"),
    "a header beyond the limit": (framed(b" " * (MAX_HEADER_BYTES + 1)), "its header claims 16,000,001 bytes"),
    "a header beyond the file": (framed(b"{}", 3), "its header claims 3 bytes"),
    "no header": (b"", "is no whole safetensors file"),
    "no JSON": (framed(b"{]"), "its header is not one"),
    "a list": (framed(b"[1]"), "its header is not one"),
    "depth": (framed(b"[" * 100_000), "its header is not one"),
    "an endless shape": (framed(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 1]}}'), "is not one"),
    "a name that clears the screen": (
        framed(rb'{"\u001b[2J": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'),
        r"'\\x1b\[2J' is not the name of a tensor",
    ),
    "other tensors": (
        framed(b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}') + b"1234",
        "does not fit SDResNetCifar: missing: .*; unexpected: a",
    ),
    "a pickle by another name": (pickle.dumps(print), "is no whole safetensors file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_hostile_weights_file_is_refused_before_it_is_read(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, said = BROKEN[case]
    monkeypatch.setattr(safetensors.torch, "load_file", None)
    (folder / MODEL).write_bytes(content)
    write_sums(folder)
    with pytest.raises(InputError, match=said) as caught:
        open_hub(folder)
    assert str(caught.value).isprintable()


def rewritten(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], said: dict[str, Any] | None = None
) -> None:
    state = safetensors.torch.load_file(folder / MODEL)
    change(state)
    safetensors.torch.save_file(state, folder / MODEL, {"sdzoo": json.dumps(said)} if said else None)
    write_sums(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("fc.bias"), "missing: fc.bias"),
        (lambda state: state.update(evil=torch.zeros(1)), "unexpected: evil"),
        (lambda state: state.update({"fc.bias": torch.zeros(11)}), r"of another shape: fc.bias \(11,\) for \(10,\)"),
        (lambda state: state.update({"fc.bias": torch.zeros(10, dtype=torch.int64)}), "'fc.bias' is 'I64'; F64 or"),
        (lambda state: state.update({"fc.bias": torch.zeros(10).to(torch.float8_e4m3fn)}), "'F8_E4M3'; F64 or"),
        (lambda state: state.update({"bn1.num_batches_tracked": torch.tensor(1.0)}), "'bn1.num_.*' is 'F32'; I64"),
    ],
)
def test_weights_of_another_model_are_refused(change: Callable[[Any], object], said: str, folder: Path) -> None:
    rewritten(folder, change)
    with pytest.raises(InputError, match=said):
        open_hub(folder)


@pytest.mark.parametrize("name", ["arch", "num_classes", "model_kwargs"])
def test_a_configuration_that_contradicts_the_weights_is_refused(name: str, folder: Path) -> None:
    said = {"arch": "sd_resnet20", "num_classes": 10, "model_kwargs": {"global_pool": "avg"}}
    rewritten(folder, lambda state: None, said)
    open_hub(folder)
    rewritten(folder, lambda state: None, said | {name: {"arch": "sd_resnet32", "num_classes": 9}.get(name, {})})
    with pytest.raises(InputError, match=f"says {name} is .*; config.json says"):
        open_hub(folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("remote", [True, False])
def test_a_pickle_beside_is_never_opened_and_alone_is_refused(remote: bool, hub: HubServer, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    source = REPO if remote else str(folder)
    hub.add(REPO, folder)
    load_hub(source)
    assert len(hub.ranges) == remote, "one file, the safetensors"
    (folder / MODEL).unlink()
    hub.add(REPO, folder)
    with pytest.raises(
        InputError, match="holds no model.safetensors" + ("; pickles, as 'pytorch_model.bin', are" * remote)
    ):
        load_hub(source)


@pytest.mark.parametrize("name", [CONFIG, MODEL, SUMS])
def test_a_link_in_a_folder_is_not_followed(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is a symbolic link"):
        open_hub(folder)


@pytest.mark.parametrize("line", ["0" * 64 + "  ../../../../tmp/evil\n", "0" * 64 + "  /etc/passwd\n"])
def test_sums_that_lead_out_of_the_folder_are_refused(line: str, hub: HubServer, folder: Path) -> None:
    with open(folder / SUMS, "a") as file:
        file.write(line)
    hub.add(REPO, folder)
    for source in (REPO, folder):
        with pytest.raises(InputError, match=r"SHA256SUMS, line 3: .* is not a sha256, two spaces, a plain name"):
            open_hub(source)


def test_a_repository_with_paths_that_lead_out_is_read_by_plain_names(
    hub: HubServer, folder: Path, cache: Path
) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.add(REPO, {**files, "../../evil": b"out", "/etc/evil": b"out"})
    open_hub(REPO)
    assert not list(cache.parent.rglob("evil"))


@pytest.mark.parametrize("name", [SUMS, CONFIG, MODEL])
def test_without_one_of_the_three_nothing_loads(name: str, hub: HubServer, folder: Path) -> None:
    (folder / name).unlink()
    hub.add(REPO, folder)
    for source in (REPO, folder):
        with pytest.raises(InputError, match=f"holds no {name}"):
            open_hub(source)


@pytest.mark.parametrize("name", [CONFIG, MODEL])
def test_sums_that_leave_one_out_are_refused(name: str, folder: Path) -> None:
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if name not in line))
    with pytest.raises(InputError, match=f"does not list {name}"):
        open_hub(folder)


@pytest.mark.parametrize("commit", ["../../victim", "", "0" * 39, "A" * 40, "main", "/victim", "\x1b[2J" + "0" * 36])
def test_what_a_hub_calls_a_commit_becomes_no_folder_unless_it_is_one(tmp_path: Path, commit: str) -> None:
    """As it may answer when something is published: an absolute path would be taken for the place itself."""
    cache, name = tmp_path / "cache", "config.json"
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / name).write_text("mine")
    named = str(victim) if commit == "/victim" else commit
    with pytest.raises(HubError, match=r"the Hub calls .* a commit") as caught:
        download(HfApi(endpoint="http://127.0.0.1:9", token=False), cache, "org/x", named, name, 9)
    assert str(caught.value).isprintable()
    assert (victim / name).read_text() == "mine" and not cache.exists()
