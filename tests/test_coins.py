"""Search from coarse labels, whole: what it must show on digit-pairs, and what the recipe does with its settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestling.bundle import load_bundle
from nestling.commands.init import earlier_rows
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.engine.fit import fit
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate.measure import CLEAN, measure, outputs_of
from nestling.methods import Coins
from nestling.methods.coins_hooks import switched_on
from nestling.methods.recipe import Optimizer, Stage
from nestling.models.build import build_model
from nestling.models.search import SearchModel
from nestling.objectives.instance_terms import InstanceProxy, InstanceWithin
from nestling.objectives.reducers import ConceptWeighted, Mean
from nestling.objectives.terms import Objective
from nestling.reproduce.coins_search import CIFAR100, GROCERY, SMALL
from nestling.reproduce.table import Table
from running import QUICK, refuse, succeed, table
from small import quick, small_model


def fine_recall(variant: str) -> float:
    """Fine R@1 in per cent on the test pairs, after 20 epochs on the 2,000 training pairs."""
    recipe = Coins(variant=variant, epochs=20, batch_size=64, augmentation="crop")
    train, test = (load_data("digit-pairs", split) for split in ("train", "test"))
    options = {"backbone": "conv:32/64/128", "device": "cpu", "precision": "fp32", "verbose": False, "whole": True}
    run = fit(recipe, train, **options)  # type: ignore[arg-type]
    outputs = outputs_of(run.model, run.preprocessing, test, Runtime.choose("cpu", "fp32"))
    assert run.model.answers(outputs[CLEAN]).combined.keys() == {"coarse"}, "no fine label was seen"
    return 100 * measure(run.model, outputs, test).metrics["retrieval"]["fine"]["1"]


def test_coarse_labels_find_fine_classes() -> None:
    """More than either of its parts: coarse labels alone leave the right digit out, instances alone the left one."""
    assert Coins().variant == "coins-imp" and Coins().instance_weight == 0.5
    found = {variant: fine_recall(variant) for variant in ("cos", "ins", "coins-imp")}
    assert found["coins-imp"] >= found["cos"] + 20, found
    assert found["coins-imp"] >= found["ins"] + 8, found


def stage_of(recipe: Coins, data: LabelledData) -> tuple[Stage, SearchModel]:
    model = small_model(data, method="coins", options=recipe.network())
    assert isinstance(model, SearchModel)
    return next(iter(recipe.stages(model, data))), model


TERMS = {
    "ins": {"coarse", "instance"},
    "cos": {"coarse"},
    "coins": {"coarse", "instance"},
    "coins-imp": {"coarse", "instance"},
    "coins-cos": {"coarse", "instance"},
    "coins-cos-mlp": {"coarse", "instance"},
    "coinsp": {"coarse", "instance", "proxy"},
    "supcon": {"coarse", "contrast"},
    "moco": {"coarse", "instance"},
    "moco-coarse": {"coarse", "instance"},
    "opt": {"fine"},
}


@pytest.mark.parametrize("variant", TERMS)
def test_variants(variant: str, toy_data: LabelledData) -> None:
    stage, model = stage_of(Coins(variant=variant, instance_weight=0.3, epochs=4), toy_data)
    weighted = {term.name: (weight, term) for weight, term in Objective.of(stage.objective).weighted()}
    assert weighted.keys() == TERMS[variant]
    headed = ("coins-cos-mlp", "coinsp", "supcon", "moco", "moco-coarse")
    assert model.cosine == (variant in ("coins-cos", *headed))
    assert isinstance(model.projection, torch.nn.Identity) == (variant not in headed)
    assert model.probe == (variant in ("ins", "supcon", "moco"))
    assert stage.pairs == (variant in ("moco", "moco-coarse"))
    assert stage.select is None, "the last epoch is kept"
    if stage.pairs:
        assert {name: weight for name, (weight, _) in weighted.items()} == {
            "coarse": 0.5 if variant == "moco-coarse" else 1.0,
            "instance": 1.0,
        }
    elif "instance" in weighted:
        weight, term = weighted["instance"]
        assert weight == (1 if variant == "ins" else 0.3)
        assert isinstance(term, InstanceWithin) == (variant not in ("ins", "coins"))
    if variant == "coinsp":
        weight, term = weighted["proxy"]
        assert callable(weight) and [weight(p) for p in (0, 0.49, 0.5, 1)] == [0, 0, 0.5, 0.5]
        assert isinstance(term, InstanceProxy) and len(term.proxies) == 240 // 5


def test_proxies_begin_with_a_whole_epoch() -> None:
    assert [switched_on(epochs) for epochs in (1, 2, 3, 5, 200)] == [1, 1 / 2, 2 / 3, 3 / 5, 1 / 2]


def test_proxies_are_made_as_often_as_they_are_used(monkeypatch: pytest.MonkeyPatch, toy_data: LabelledData) -> None:
    made: list[int] = []
    monkeypatch.setattr(InstanceProxy, "cluster", lambda self, seed: made.append(seed))
    quick(Coins(variant="coinsp", epochs=5, batch_size=16, steps_per_epoch=1), toy_data)
    assert len(made) == len(set(made)) == 2, "after epochs 3 and 4 of 5"
    with pytest.raises(UsageError, match="epochs must be at least 2, got 1"):
        Coins(variant="coinsp", epochs=1)


def test_the_classifier_of_instances_alone_shapes_nothing(toy_data: LabelledData) -> None:
    """A probe: its loss has no gradient in the backbone."""
    for variant, shapes in (("ins", False), ("coins", True)):
        _, model = stage_of(Coins(variant=variant), toy_data)
        outputs = model(torch.rand(4, 1, 8, 8))
        outputs.logits["coarse"].sum().backward()
        assert (next(model.backbone.parameters()).grad is not None) == shapes
        assert model.classifier.weight.grad is not None


def test_the_cosine_softmax_by_hand(toy_data: LabelledData) -> None:
    """Logits are cosines over the temperature, which may be learned; search sees the features before the head."""
    _, model = stage_of(Coins(variant="coins-cos-mlp", temperature=0.2, learn_temperature=True, mlp=5), toy_data)
    images = torch.rand(3, 1, 8, 8)
    outputs = model.eval()(images)
    z = model.projection(outputs.embedding)
    for row in range(3):
        for c in range(2):
            w = model.classifier.weight[c]
            cosine = (z[row] @ w / (z[row].norm() * w.norm())).item()
            assert outputs.logits["coarse"][row, c].item() == pytest.approx(cosine / 0.2, abs=1e-5)
    assert outputs.embedding.shape == (3, 8) and outputs.features["coarse"].shape == (3, 5)
    outputs.logits["coarse"].square().sum().backward()
    assert model.log_factor is not None and model.log_factor.grad is not None and model.log_factor.grad != 0


def test_rows_without_coarse_label(toy_data: LabelledData) -> None:
    data = toy_data.keep({"coarse": 0.5}, seed=2)
    known = np.flatnonzero(data.labels[:, 0] >= 0)
    skipping, _ = stage_of(Coins(), data)
    assert skipping.rows is not None and skipping.rows.tolist() == known.tolist()
    taking, _ = stage_of(Coins(unlabelled="instance"), data)
    term = Objective.of(taking.objective).weighted()[1][1]
    assert isinstance(term, InstanceWithin) and taking.rows is not None and len(taking.rows) == 240
    assert term.rows.starts == [0, *np.cumsum([*np.bincount(data.labels[known, 0]), 240 - len(known)]).tolist()]
    quick(Coins(unlabelled="instance", epochs=1, batch_size=16, steps_per_epoch=2), data)


def test_concept_weights_are_of_the_coarse_term(toy_data: LabelledData) -> None:
    recipe = Coins(concept_weights="middle")
    _, model = stage_of(recipe, toy_data)
    objective, _ = recipe.objective(model, toy_data, np.arange(240))
    assert [type(term.reducer) for _, term in objective.weighted()] == [ConceptWeighted, Mean]


def test_a_bundle_remembers_the_network(toy_data: LabelledData, tmp_path) -> None:
    from nestling import from_pretrained

    run = quick(Coins(variant="coinsp", learn_temperature=True, epochs=2, batch_size=32, steps_per_epoch=2), toy_data)
    run.save_pretrained(tmp_path / "bundle")
    images = toy_data.inputs[:5].numpy()[:, 0]
    predictor = from_pretrained(tmp_path / "bundle", "cpu")
    with torch.no_grad():
        expected = run.model(run.preprocessing(toy_data.images(np.arange(5)))).embedding
    np.testing.assert_allclose(predictor.embed(images), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert [answer["answer"]["level"] for answer in predictor.predict(images)] == ["coarse"] * 5


def test_coins_can_be_built_by_name(toy_data: LabelledData) -> None:
    model = build_model(toy_data.taxonomy, (1, 8, 8), "conv:4/8", "coins", {"level": "middle", "mlp": 3})
    assert isinstance(model, SearchModel) and model.outputs == ("middle",) and model.dimension == 3


@pytest.mark.parametrize("table", [CIFAR100, SMALL, GROCERY], ids=lambda table: table.name)
def test_the_paper_bears_its_claims_out(table: Table) -> None:
    """By its own numbers, where it prints them; and nothing is compared that differs in two things."""
    for claim in table.claims:
        assert claim.paper is None or claim.paper > claim.least, claim.id
        rows = {name.rpartition(" ")[2] for name, _ in (claim.more, claim.less)}
        assert rows != {"coins-cos", "coins"}, claim.id
    assert len({claim.id for claim in table.claims}) == len(table.claims)
    assert "were not searched" in table.about and "one view" in table.about


# The command line ----------------------------------------------------------------------------------------------------

QUICKLY = ("--method", "coins", *QUICK)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tables of its 40 and 48 pictures, two coarse and four fine classes; a row in four for the test."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    lines = []
    for number in range(48):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number}.png")
        coarse, split = "ab"[number % 2], "test" if number % 12 > 8 else "train"
        lines.append((f"{number}.png", coarse, f"{coarse}{number % 4}", split))
    for count in (40, 48):
        table(folder / f"{count}.csv", ["path", "coarse", "fine", "split"], lines[:count])
    return folder


def test_more_proxies_than_rows_is_refused(pictures: Path, tmp_path: Path) -> None:
    """Before anything is written."""
    arguments = ("train", pictures / "48.csv", *QUICKLY, "variant=coinsp", "epochs=2", "num_proxies=37")
    line = refuse(2, ["num_proxies must lie between 1 and the number of rows", "got 37"], *arguments, "--out",
                  tmp_path / "run")  # fmt: skip
    assert "Traceback" not in line and not (tmp_path / "run").exists()


def test_settings_without_effect_are_said_once(pictures: Path, tmp_path: Path) -> None:
    arguments, out = ("train", pictures / "40.csv", *QUICKLY), ("--out", tmp_path / "run")
    done = succeed(*arguments, "variant=ins", "proxy_weight=0.1", "temperature=0.2", "optimizer.patience=3", *out)
    warnings = [line for line in done.err.splitlines() if "has no effect" in line]
    assert [line.split()[1] for line in warnings] == ["optimizer.patience", "proxy_weight", "temperature"]
    assert warnings[1].endswith("it takes proxies, which variant ins does not have here")
    # A run's own file names every field: those that are as ever are no cause for a warning.
    again = succeed("train", "--config", tmp_path / "run" / "recipe.toml", "--device", "cpu", *out)
    assert again.err.count("has no effect") == 3


IDLE = {
    "ins": {"instance_weight", "proxy_weight", "temperature", "mlp"},
    "cos": {"instance_weight", "proxy_weight", "temperature", "mlp", "unlabelled"},
    "coins-imp": {"proxy_weight", "temperature", "mlp"},
    "coins-cos": {"proxy_weight", "mlp"},
    "coins-cos-mlp": {"proxy_weight"},
    "coinsp": set(),
    "supcon": {"instance_weight", "proxy_weight", "unlabelled"},
    "opt": {"instance_weight", "proxy_weight", "temperature", "mlp", "unlabelled", "label_level"},
}


@pytest.mark.parametrize("variant", IDLE)
def test_fields_without_effect(variant: str) -> None:
    """Those that a variant ignores, and no other."""
    asked = set().union(*IDLE.values())
    assert asked & Coins(variant=variant).idle.keys() == IDLE[variant]
    assert "concept_strength" in Coins().idle and "concept_strength" not in Coins(concept_weights="middle").idle
    assert Coins().optimizer.idle.keys() == {"optimizer.patience"}
    assert Optimizer().idle.keys() >= {"optimizer.momentum", "optimizer.drops", "optimizer.restarts"}


def test_rows_added_later_go_on_by_init(pictures: Path, tmp_path: Path) -> None:
    """A table that gains rows: the rows of the run before go on, and its head; the new ones start afresh."""
    old, more = pictures / "40.csv", pictures / "48.csv"
    still = ("optimizer.lr=1e-12", "optimizer.weight_decay=0.0", "optimizer.momentum=0.0")
    options = (*QUICKLY, "variant=coins-cos-mlp", "mlp=5")
    succeed("train", old, *options, "--out", tmp_path / "old")
    init = ("--init", tmp_path / "old", "--out")
    done = succeed("train", more, *options, *still, *init, tmp_path / "more")
    before, after = (earlier_rows(tmp_path / name) for name in ("old", "more"))
    assert before is not None and after is not None and before.weight.shape[1] == 5
    assert f"{len(before.numbers)} instance rows of {tmp_path / 'old'} go on" in done.err
    kept = {int(number): row for number, row in zip(before.numbers, before.weight, strict=True)}
    both = [place for place, number in enumerate(after.numbers.tolist()) if number in kept]
    assert 10 < len(both) < len(after.numbers)
    for place in both:
        torch.testing.assert_close(after.weight[place], kept[int(after.numbers[place])], rtol=0, atol=1e-6)
    given, model = (load_bundle(tmp_path / name).model for name in ("old", "more"))
    assert isinstance(given, SearchModel) and isinstance(model, SearchModel)
    for mine, theirs in zip(model.projection.parameters(), given.projection.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    # Rows behind another head mean nothing here, and a bundle has none.
    assert "are of another head" in succeed("train", more, *options, "mlp=7", *init, tmp_path / "other").err
    assert earlier_rows(tmp_path / "old" / "model") is None


def test_hidden_coarse_labels_on_the_command_line(pictures: Path, tmp_path: Path) -> None:
    """``--known``: the rows that lose them are skipped, or a class of their own."""
    arguments, shown = ("train", pictures / "48.csv", *QUICKLY), {}
    for unlabelled in ("skip", "instance"):
        out = tmp_path / unlabelled
        succeed(*arguments, f"unlabelled={unlabelled}", "--known", "coarse=0.5,fine=0", "--out", out)
        rows = earlier_rows(out)
        assert rows is not None
        shown[unlabelled] = set(rows.numbers.tolist())
    assert shown["skip"] < shown["instance"] and len(shown["instance"]) >= 1.8 * len(shown["skip"])
    none = ("--known", "coarse=0", "--out", tmp_path / "none")
    refuse(2, ["no training row is labelled at level 'coarse'"], *arguments, *none)
