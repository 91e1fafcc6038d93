"""Bundles: what is saved is what is loaded, and whatever is damaged is said so in one line."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestling import from_pretrained
from nestling.bundle import FILES, load_bundle, save_bundle
from nestling.data.transforms import Preprocessing
from nestling.errors import StorageError, UsageError
from nestling.models.build import build_model
from nestling.models.model import Model
from nestling.taxonomy import Taxonomy
from running import nestling, refuse

PREPROCESSING = Preprocessing(1, 8, 8, (0.3,), (0.25,))


def small(taxonomy: Taxonomy, method: str = "nested", backbone: str = "conv:4/8") -> Model:
    """Fresh weights, temperatures that are not 1, and batch norms that have seen something."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = build_model(taxonomy, (1, 8, 8), backbone, method)
        model.train()(torch.randn(16, 1, 8, 8))
        for number, head in enumerate(model.outputs):
            model.calibration.set_temperatures(head, 1.5 + number)
    return model.eval()


@pytest.fixture(scope="module")
def saved(toy_taxonomy: Taxonomy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; copied before it is damaged."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_bundle(folder, small(toy_taxonomy), PREPROCESSING, "a card", source="digits", seed=3)
    return folder


@pytest.fixture
def bundle(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("method", ["nested", "nested with rejection", "end-to-end", "flat-marginal"])
def test_what_is_saved_is_loaded(method: str, toy_taxonomy: Taxonomy, tmp_path: Path) -> None:
    model = small(toy_taxonomy, method.split()[0])
    if "rejection" in method:
        model.calibration.add_rejection()
        model.config["rejection"] = True
    save_bundle(tmp_path / "model", model, PREPROCESSING, source="here", seed=3, known={"fine": 0.5})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted([*FILES, "README.md"])
    loaded = load_bundle(tmp_path / "model")
    assert loaded.preprocessing == PREPROCESSING and loaded.model.taxonomy == toy_taxonomy
    assert loaded.config["known"] == {"fine": 0.5} and loaded.model.config == model.config
    mine, theirs = model.state_dict(), loaded.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not loaded.model.training

    # Saved once more it is the same, byte for byte; the run folder above it serves as well.
    save_bundle(tmp_path / "again", loaded.model, loaded.preprocessing, source="here", seed=3, known={"fine": 0.5})
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    assert from_pretrained(tmp_path).predict(images) == from_pretrained(tmp_path / "model").predict(images)


def test_a_path_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        load_bundle(tmp_path / "none")
    with pytest.raises(UsageError, match="neither a run nor a bundle"):
        load_bundle(tmp_path)
    (tmp_path / "recipe.toml").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="not finished: run the same training command again"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_missing(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    refuse(5, ["is damaged", f"'{name}' missing"], "predict", bundle, "a.png")
    (bundle / name).mkdir()
    refuse(5, ["is damaged", f"'{name}' missing"], "evaluate", bundle.parent)


CONTENTS = [b"", b"null", b"[]", b"{}", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"format": 1}', b"\0" * 99]


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_something_else(name: str, bundle: Path) -> None:
    whole = (bundle / name).read_bytes()
    cuts = [whole[:length] for length in (1, 7, 8, 9, 20, len(whole) // 2, len(whole) - 1)]
    for content in [*CONTENTS, *cuts, whole + b"\0", whole + whole]:
        (bundle / name).write_bytes(content)
        refuse(5, ["model"], "predict", bundle, "a.png")


def test_too_large_a_file_is_not_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestling.bundle.LARGEST_JSON", 100)
    refuse(5, ["config.json", "more than 100"], "predict", bundle, "a.png")
    monkeypatch.undo()
    monkeypatch.setattr("nestling.bundle.LARGEST", 100)
    refuse(5, ["model.safetensors", "more than 100"], "predict", bundle, "a.png")


def test_a_newer_format(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    (bundle / "config.json").write_text(json.dumps(config | {"format": 2}), encoding="utf-8")
    refuse(5, ["format 2, newer than this nestling reads (1)", "update nestling"], "predict", bundle, "a.png")


# Fuzzing. A damaged bundle is a StorageError of one line, or answers; nothing else leaves.


def attempt(bundle: Path) -> bool:
    """Whether it loads; then it must answer too."""
    try:
        predictor = from_pretrained(bundle)
        for answer in predictor.predict(np.zeros((2, 8, 8), np.uint8)):
            assert all(0 <= value <= 1 for value in answer["confidence"])
    except StorageError as error:
        if len(str(error)) > 700:
            pytest.fail(f"too long: {error}")
        return False
    return True


JUNK = [
    *(None, True, 0, -1, 2, 3.5, 10**30, 1e308, float("nan"), "x", "", [], {}, [[]], [None], {"a": 1}),
    *([10**12] * 3, [1, 8, 9], "conv:50000-50000", "conv:" + "8-" * 2000 + "8", "resnet34-9999"),
    *("nested", "end-to-end", "\n\nTraceback"),
]


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a JSON, the whole of it first."""
    yield path
    if isinstance(node, Mapping):
        for key in node:
            yield from places(node[key], (*path, key))
    elif isinstance(node, list):
        for number in range(len(node)):
            yield from places(node[number], (*path, number))


def replaced(node: Any, path: tuple, value: Any) -> Any:
    """The JSON with another value at ``path``; ``KeyError`` stands for none."""
    if not path:
        return value
    node = copy.deepcopy(node)
    inner = node
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return node


@pytest.mark.parametrize("name", ["config.json", "taxonomy.json"])
def test_any_value_of_any_type(name: str, bundle: Path) -> None:
    content = json.loads((bundle / name).read_text(encoding="utf-8"))
    options = ("skips", "norm", "hidden", "dropout")
    harmless = {("nestling",), ("source",), ("seed",), *(("model", "options", name) for name in options)}
    # Bundles of before lack it.
    harmless |= {("parent", "coarse"), ("model", "options", "plain")}
    refused = 0
    for path in places(content):
        for value in JUNK if path else JUNK[:8]:
            (bundle / name).write_text(json.dumps(replaced(content, path, value)), encoding="utf-8")
            refused += not attempt(bundle)
        if path:
            (bundle / name).write_text(json.dumps(replaced(content, path, KeyError)), encoding="utf-8")
            assert attempt(bundle) == (path in harmless), path
    assert refused > 200


def test_sizes_that_no_memory_holds(bundle: Path) -> None:
    """Nothing is allocated for a model whose weights the file does not hold."""
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    for backbone in ("conv:65536-65536", "conv:65536/65536", "resnet34-9999"):
        changed = replaced(config, ("model", "backbone"), backbone)
        (bundle / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(StorageError, match="is damaged"):
            load_bundle(bundle)
    for shape in ([1, 8, 10**12], [10**12, 8, 8], [10**30, 8, 8], [1, 8, True]):
        changed = replaced(config, ("model", "input_shape"), shape)
        changed["preprocessing"] |= dict(zip(("channels", "height", "width"), shape, strict=True))
        (bundle / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(StorageError):
            load_bundle(bundle)


CONTRADICTIONS: dict[str, Callable[[dict], Any]] = {
    "a parent that is not there": lambda t: t["parent"]["fine"].__setitem__(0, 7),
    "a parent below nothing": lambda t: t["parent"]["middle"].__setitem__(0, -1),
    "a class twice": lambda t: t["classes"]["fine"].__setitem__(1, t["classes"]["fine"][0]),
    "a class without parent": lambda t: t["classes"]["fine"].append("more"),
    "a level without classes": lambda t: t["levels"].append("finest"),
    "a level twice": lambda t: t["levels"].__setitem__(1, "coarse"),
    "no level": lambda t: t.update(levels=[], classes={}, parent={}),
    "another order of levels": lambda t: t["levels"].reverse(),
    "one class more, with parent": lambda t: (t["classes"]["fine"].append("more"), t["parent"]["fine"].append(0)),
    "a level renamed": lambda t: json.loads(json.dumps(t).replace("middle", "between")),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_taxonomy_that_contradicts_itself_or_the_weights(name: str, bundle: Path) -> None:
    content = json.loads((bundle / "taxonomy.json").read_text(encoding="utf-8"))
    changed = CONTRADICTIONS[name](content)
    content = changed if isinstance(changed, dict) else content
    (bundle / "taxonomy.json").write_text(json.dumps(content), encoding="utf-8")
    refuse(5, ["is damaged", "save it again, or train again"], "predict", bundle, "a.png")


def test_any_byte(bundle: Path) -> None:
    generator = random.Random(0)
    for _ in range(250):
        name = generator.choice(FILES)
        whole = (bundle / name).read_bytes()
        data = bytearray(whole)
        end = generator.choice([9, 2500, len(data)])
        for _ in range(generator.choice([1, 1, 2, 8])):
            data[generator.randrange(min(end, len(data)))] = generator.randrange(256)
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        (bundle / name).write_bytes(data)
        attempt(bundle)
        (bundle / name).write_bytes(whole)
    assert attempt(bundle)


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Of a safetensors file the header and what follows."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(head: dict[str, Any] | bytes, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file; ``length`` is what it says of its header."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def lies(head: dict[str, Any], body: bytes) -> Iterator[tuple[str, bytes]]:
    """Files whose header says what is not so."""
    name = next(key for key, value in head.items() if value["dtype"] == "F32")
    one = head[name]
    size = one["data_offsets"][1] - one["data_offsets"][0]
    for length in (2**64 - 1, 2**63, 10**9, len(body), 3, 0):
        yield f"a header of {length} bytes", packed(head, body, length)
    for key, value in {
        "dtype": "F64", "shape": [2**40, 2**40], "data_offsets": [0, 2**63],
    }.items():  # fmt: skip
        yield f"{key} {value}", packed({**head, name: {**one, key: value}}, body)
    yield "an unknown dtype", packed({**head, name: {**one, "dtype": "X8"}}, body)
    yield (
        "offsets the wrong way round",
        packed({**head, name: {**one, "data_offsets": one["data_offsets"][::-1]}}, body),
    )
    yield "a negative shape", packed({**head, name: {**one, "shape": [-1]}}, body)
    yield "another shape", packed({**head, name: {**one, "shape": [size // 4]}}, body)
    yield "all at one place", packed({k: {**v, "data_offsets": [0, size]} for k, v in head.items()}, body)
    yield "integers", packed({k: {**v, "dtype": "I32"} if v["dtype"] == "F32" else v for k, v in head.items()}, body)
    yield "other names", packed({f"{k}.x": v for k, v in head.items()}, body)
    yield "one too few", packed({k: v for k, v in head.items() if k != name}, body)
    yield "nothing", packed({}, b"")
    yield "depth", packed(b'{"a":' * 50_000, body)
    yield "not a number", packed(head, b"\xff" * len(body))
    yield "zeros", packed(head, b"\0" * len(body))


def test_headers_that_lie(bundle: Path) -> None:
    head, body = header((bundle / "model.safetensors").read_bytes())
    for name, data in lies(head, body):
        (bundle / "model.safetensors").write_bytes(data)
        assert not attempt(bundle), name
        assert "Traceback" not in nestling("predict", bundle, "a.png").err
    (bundle / "model.safetensors").write_bytes(packed({"__metadata__": {"by": "us"}, **head}, body))
    assert attempt(bundle)


def test_weights_that_overflow(bundle: Path, tmp_path: Path) -> None:
    """Finite each, but what they compute is not."""
    from safetensors.torch import load, save

    tensors = load((bundle / "model.safetensors").read_bytes())
    for name in tensors:
        if name.startswith("head."):
            tensors[name] = torch.full_like(tensors[name], 3e38)
    (bundle / "model.safetensors").write_bytes(save(tensors))
    with pytest.raises(StorageError, match="not finite"):
        from_pretrained(bundle).predict(np.full((1, 8, 8), 200, np.uint8))


def test_no_pickle_is_read(bundle: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, bundle / "model.pt")
    (bundle / "model.safetensors").write_bytes((bundle / "model.pt").read_bytes())
    refuse(5, ["is damaged"], "predict", bundle, "a.png")
