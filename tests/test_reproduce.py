"""``nestling reproduce``: verdicts, resuming, budgets, the recipes of the papers, and every table at smoke."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nestling.reproduce.campaign as campaigns
from nestling.config import apply, read_config
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.data.text import TextEncoding
from nestling.engine.fit import fit
from nestling.errors import DataError
from nestling.methods.baselines import EndToEnd
from nestling.methods.coins import Coins
from nestling.methods.layerwise import Layerwise
from nestling.methods.prune import Compression
from nestling.methods.robust import Robust
from nestling.models.build import build_model
from nestling.reproduce import TABLES, robust_measures
from nestling.reproduce.campaign import Campaign, pack, stored, unpack
from nestling.reproduce.layerwise import on_cifar, on_imagenet, trial, twin
from nestling.reproduce.probes import Reduction, per_class
from nestling.reproduce.result import result_of, text_of
from nestling.reproduce.robust_concepts import LEAST_GAIN, least_gain
from nestling.reproduce.robust_measures import rows_worth
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import SCALES, Cell, Claim, Floor, Table, Trial
from nestling.reproduce.verdict import decide, difference, gather, summary
from nestling.taxonomy import Taxonomy
from running import nestling, refuse, succeed

VERDICTS = {"holds", "does not hold", "within noise", "underpowered"}
FLOOR = Floor(row="twin", column="x", least=0.5)
CLAIM = Claim(id="more", text="a is better than b", more=("a", "x"), less=("b", "x"), paper=0.1)


def over_seeds(row: str, *values: float) -> list[list[Cell]]:
    return [[Cell(row, "x", value)] for value in values]


def measured(a: list[float], b: list[float], twin: float = 0.9):
    rows = [[*x, *y, Cell("twin", "x", twin)] for x, y in zip(over_seeds("a", *a), over_seeds("b", *b))]
    return gather(dict(enumerate(rows)))


# Verdicts ----------------------------------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_the_paired_t_interval() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t of 2 degrees of freedom 4.3027, over the root of 3.
    cells = measured([0.6, 0.7, 0.8], [0.5, 0.5, 0.5])
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert difference(cells["a", "x"], cells["b", "x"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "twin", "verdict"),
    [
        ([0.61, 0.62, 0.63], [0.5, 0.5, 0.5], 0.9, "holds"),
        ([0.41, 0.42, 0.43], [0.5, 0.5, 0.5], 0.9, "does not hold"),
        ([0.49, 0.50, 0.51], [0.5, 0.5, 0.5], 0.9, "within noise"),
        ([0.30, 0.50, 0.70], [0.5, 0.5, 0.5], 0.9, "underpowered"),
        ([0.61, 0.62, 0.63], [0.5, 0.5, 0.5], 0.4, "underpowered"),
        ([0.61, 0.62], [0.5, 0.5], 0.9, "underpowered"),
    ],
    ids=["holds", "fails", "noise", "wide", "below the floor", "two seeds"],
)
def test_verdicts(a: list[float], b: list[float], twin: float, verdict: str) -> None:
    assert decide(measured(a, b, twin), [CLAIM], FLOOR)[0]["verdict"] == verdict


def test_a_claim_without_a_number_is_never_within_noise() -> None:
    claim = replace(CLAIM, paper=None)
    assert decide(measured([0.49, 0.5, 0.51], [0.5, 0.5, 0.5]), [claim], FLOOR)[0]["verdict"] == "underpowered"


def test_a_claim_may_allow_a_loss() -> None:
    claim = replace(CLAIM, least=-0.05)
    assert decide(measured([0.479, 0.48, 0.481], [0.5, 0.5, 0.5]), [claim], FLOOR)[0]["verdict"] == "holds"


def test_below_three_seeds_the_interval_is_of_the_test_rows() -> None:
    right = np.random.default_rng(0).random(1000) < 0.8
    more = {0: Cell("a", "x", float(right.mean()), tuple(right.astype(float)))}
    less = {0: Cell("b", "x", 0.0, (0.0,) * 1000)}
    found = difference(more, less)
    assert found is not None and found[0] == pytest.approx(right.mean())
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 1000)
    assert found[1:] == pytest.approx((found[0] - half, found[0] + half), abs=0.004)


def test_shares_without_rows_of_their_own_take_the_normal_approximation() -> None:
    found = difference({0: Cell("a", "x", 0.5, count=100)}, {0: Cell("b", "x", 0.5, count=100)})
    assert found == pytest.approx((0.0, -1.96 * math.sqrt(0.005), 1.96 * math.sqrt(0.005)), abs=1e-4)


def test_a_mean_of_concepts_is_as_uncertain_as_its_parts() -> None:
    # Of four shares of 0.5 on 25 rows each the mean is one on 100 rows; a share by itself is of its own rows.
    assert rows_worth(0.5, [(0.5, 25, 0.25)] * 4) == 100
    assert rows_worth(0.8, [(0.8, 30, 1.0)]) == 30
    # 0.9 - 0.5 on 40 rows each: (0.09 + 0.25) / 40 = 0.24 / 28.2.
    assert rows_worth(0.4, [(0.9, 40, 1.0), (0.5, 40, -1.0)]) == 28
    assert rows_worth(1.0, [(1.0, 30, 1.0)]) == 0


def test_what_was_not_measured_is_said() -> None:
    entry = decide({}, [CLAIM], FLOOR)[0]
    assert (entry["ours"], entry["interval"], entry["verdict"]) == (None, [None, None], "underpowered")
    assert summary({}, {("a", "x"): 0.9}) == [
        {"row": "a", "column": "x", "paper": 0.9, "mean": None, "std": None, "n": 0}
    ]


@pytest.mark.parametrize("samples", [(), (1.0, 0.0, 1.0) * 7, (0.25, 0.5)])
def test_a_cell_survives_json(samples: tuple[float, ...]) -> None:
    cell = Cell("a", "x", 0.5, samples, 3)
    assert unpack(json.loads(json.dumps(pack(cell)))) == cell


# Campaigns, on a table of our own ----------------------------------------------------------------------------------


def digit_trials(scale: str) -> list[Trial]:
    recipe = Layerwise(k=1, width=4, num_blocks=2, downsample_at=(1,), epochs=1, batch_size=64, augmentation="none")
    rows = Rows(source="digits", train=200, test=100)
    return [trial(scale, "layers", recipe, rows), trial(scale, "end-to-end", twin(recipe), rows)]


DIGITS = Table(
    name="digits",
    paper="none",
    about="For tests.",
    trials=digit_trials,
    floor=Floor(row="end-to-end", column="single", least=0.2),
    printed={("layers", "single"): 0.5},
    claims=[Claim(id="c", text="t", more=("layers", "ensemble"), less=("end-to-end", "single"))],
)


def digits(folder: Path, *seeds: int) -> Campaign:
    return Campaign(table=DIGITS, scale="smoke", seeds=seeds or (0,), folder=folder, trainings=folder / "trainings")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "digits", DIGITS)


@pytest.mark.usefixtures("tables")
def test_the_result_is_what_the_interface_says(tmp_path: Path) -> None:
    options = ("--scale", "smoke", "--out", tmp_path)
    done = succeed("reproduce", "digits", *options, "--json", "-")
    result = json.loads(done.out)
    assert {"name", "scale", "seeds", "table", "claims", "command", "commit", "hardware", "versions", "seconds"} <= {
        *result
    }
    assert (result["name"], result["scale"], result["seeds"], result["missing"]) == ("digits", "smoke", [0], [])
    for entry in result["table"]:
        assert set(entry) == {"row", "column", "paper", "mean", "std", "n"}
        assert entry["mean"] is None or 0 <= entry["mean"] <= 1
    for claim in result["claims"]:
        assert set(claim) == {"id", "text", "paper", "ours", "interval", "verdict"} and claim["verdict"] in VERDICTS
    assert (tmp_path / "digits-smoke" / "result.png").read_bytes().startswith(b"\x89PNG")
    again = succeed("reproduce", "digits", *options, "--json", tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text())["table"] == result["table"]
    assert "(50.0)" in again.out and "underpowered" in again.out and (tmp_path / "mine.png").exists()


def test_finished_trials_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = digits(tmp_path, 0, 1)
    first = campaign.run()
    assert [len(records) for records in first.values()] == [2, 2]
    assert {p.name for p in tmp_path.glob("*.json")} == {
        f"{r}-{s}.json" for r in ("layers", "end-to-end") for s in (0, 1)
    }
    monkeypatch.setattr(campaigns, "carry_out", lambda *_: pytest.fail("trained again"))
    assert campaign.run() == first


def test_another_recipe_is_not_mistaken_for_the_same(tmp_path: Path) -> None:
    campaign = digits(tmp_path)
    campaign.run()
    (made, seed), *_ = campaign.trials()
    place = campaign.place(made, seed)
    assert stored(made, place) is not None
    assert stored(replace(made, options={"top": 5}), place) is None
    assert stored(replace(made, recipe=replace(made.recipe, epochs=2)), place) is None


def test_some_rows_alone(tmp_path: Path) -> None:
    campaign = digits(tmp_path)
    some = replace(campaign, rows=("layers",))
    assert [[cell["row"] for cell in record["cells"][:1]] for record in some.run()[0]] == [["layers"]]
    assert some.missing() == ["end-to-end-0"]
    assert len(campaign.run()[0]) == 2 and not campaign.missing()


@pytest.mark.usefixtures("tables")
def test_after_the_budget_nothing_is_begun(tmp_path: Path) -> None:
    campaign = replace(digits(tmp_path), deadline=time.time() - 1)
    result = result_of(campaign, campaign.run(), "")
    assert result["missing"] == ["layers-0", "end-to-end-0"] and not list(tmp_path.iterdir())
    assert any("goes on from here" in line for line in text_of(DIGITS, result))
    done = succeed("reproduce", "digits", "--scale", "smoke", "--out", tmp_path, "--budget-minutes", "1e-9")
    assert "Not done within the budget: layers-0, end-to-end-0" in done.out


@pytest.mark.long
def test_trials_run_side_by_side(tmp_path: Path) -> None:
    campaign = replace(digits(tmp_path), scale="small")
    assert [len(records) for records in campaign.run().values()] == [2]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("layerwise-cifar",), "Did you mean 'layerwise-cifar10'?"),
        (("layerwise-cifar10", "--scale", "smal"), "Did you mean 'small'?"),
        (("layerwise-cifar10", "--rows", "k=1,k=4"), "unknown row k=4"),
        (("layerwise-cifar10", "--jobs", "0"), "--jobs must be at least 1"),
        (("layerwise-cifar10", "--seeds", "0"), "--seeds must be at least 1"),
        (("layerwise-cifar10", "--budget-minutes", "0"), "--budget-minutes must be above 0"),
        (("layerwise-cifar10", "--budget-minutes", "nan"), "--budget-minutes must be above 0"),
    ],
)
def test_what_cannot_be_reproduced(arguments: tuple[str, ...], part: str) -> None:
    refuse(2, [part], "reproduce", *arguments)


def test_without_data_it_says_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTLING_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ("--scale", "smoke", "--out", tmp_path / "runs", "--data-dir", tmp_path)
    done = nestling("reproduce", "layerwise-transfer", *options)
    assert done.code == 5 and "tiny_imagenet32/train.parquet" in done.err


def test_unbalanced_classes_and_rows_to_choose_by(tmp_path: Path) -> None:
    rows = Rows(source="digits", sizes=(80, 20), validation=10)
    parts = rows.load(None)
    assert parts.validation is not None and rows.load(None).train.index.tolist() == parts.train.index.tolist()
    counts = np.bincount(parts.train.labels[:, -1])
    # 80 * (1/4) ** (i/9), the class of most rows first.
    assert sorted(counts.tolist(), reverse=True) == [80, 69, 59, 50, 43, 37, 32, 27, 23, 20]
    natural = np.bincount(load_data("digits").labels[:, -1])
    assert counts.argmax() == natural.argmax()
    assert set(np.bincount(parts.validation.labels[:, -1])) == {10}
    assert not set(parts.validation.index) & set(parts.train.index)
    with pytest.raises(DataError, match=r"has \d+ rows, and 130 to train on and 10 to choose by"):
        replace(rows, sizes=(130, 20)).load(None)
    assert rows.key() == {"source": "digits", "sizes": (80, 20), "validation": 10}


def test_a_share_to_choose_by() -> None:
    parts = Rows(source="digits", train=200, validation=0.1).load(None)
    assert parts.validation is not None and (len(parts.train), len(parts.validation)) == (180, 20)
    assert not set(parts.validation.index) & set(parts.train.index)


def test_every_row_trains_and_those_given_choose(toy_data: LabelledData) -> None:
    train, kept = toy_data.subset(range(100)), toy_data.subset(range(100, 140))
    run = fit(EndToEnd(epochs=1), train, validation=kept, whole=True, verbose=False)
    assert ("rows", "100 training, 40 validation, 0 calibration", "all train") in run.decisions
    assert "validation loss" in run.history[0]


# The tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_table_speaks_of_rows_that_it_has(name: str) -> None:
    for scale in SCALES:
        table = TABLES[name].at(scale)
        ids = [claim.id for claim in table.claims]
        assert len(set(ids)) == len(ids) and set(table.seeds) == set(SCALES)
        trials = table.trials(scale)
        rows = {t.row for t in trials} | {cell.row for cell in table.fixed()}
        rows |= {row for t in trials for row in t.options.get("narrower", ())}
        rows |= {
            f"{t.options['network']} {plan}"
            for t in trials
            if "network" in t.options
            for plan in ("layerwise", "end-to-end", "checkpointing")
        }
        rows |= {row for t in trials for row in t.options.get("also", ())}
        columns = {c for claim in table.claims for _, c in (claim.more, claim.less)}
        rows |= {cell.row for cell in table.derived([Cell(row, c, 0.0, (0.0, 1.0)) for row in rows for c in columns])}
        named = [table.floor.row, *(row for c in table.claims for row, _ in (c.more, c.less))]
        assert {*named, *(row for row, _ in table.printed)} <= rows
        campaign = Campaign(table=table, scale=scale, seeds=[0], folder=Path(), trainings=Path())
        places = [campaign.place(t, 0) for t in trials]
        assert len({place.record for place in places}) == len(trials)
        if scale != "smoke":
            # Else two processes would train the same network at once.
            folders = [place.training(t) for t, place in zip(trials, places) if "network" not in t.options]
            assert len(set(folders)) == len(folders)
        json.dumps([t.key() for t in trials])


@pytest.mark.parametrize("name", TABLES)
def test_every_table_runs_at_smoke(name: str, nestling_data: Path, tmp_path: Path) -> None:
    done = succeed("reproduce", name, "--scale", "smoke", "--out", tmp_path, "--data-dir", nestling_data, "--json", "-")
    result = json.loads(done.out)
    table = TABLES[name]
    assert result["missing"] == [] and not result["floor"]["reached"]
    assert {c["verdict"] for c in result["claims"]} == {"underpowered"}
    seen = {(e["row"], e["column"]) for e in result["table"] if e["mean"] is not None}
    assert {row for row, _ in seen} >= {t.row for t in table.trials("smoke") if "network" not in t.options}
    if name == "layerwise-compression":
        steps = [
            (f"{when} layer {j}") for j in (1, 2, 3) for when in ("before pruning", "after pruning", "after tuning")
        ]
        assert {("pruned", step) for step in steps} <= seen
    assert (tmp_path / f"{name}-smoke" / "result.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith("robust-")])
def test_all_methods_of_a_table_choose_the_epoch_by_one_rule(name: str) -> None:
    """Said outright: what "auto" stands for depends on the method."""
    for scale in SCALES:
        rule = "last" if scale == "paper" else "likelihood"
        rule = rule if name in ("robust-transfer", "robust-finetune") else "worst-concept"
        recipes = [made.recipe for made in TABLES[name].trials(scale)]
        assert [recipe.selection for recipe in recipes if isinstance(recipe, Robust)] == [rule] * len(recipes)


def test_where_el_gains_least() -> None:
    """Of steps 1 and 2, at which ERM has lost 2 points, step 1; at step 0.5, where EL is below it, it has lost 1."""
    columns = [f"moved step {step}" for step in ("0", "0.5", "1", "2")]
    erm = [Cell("ERM", column, value) for column, value in zip(columns, (0.9, 0.89, 0.8, 0.5))]
    el = [Cell("EL", column, value, count=7) for column, value in zip(columns, (0.88, 0.88, 0.85, 0.7))]
    found = least_gain([*erm, *el, Cell("EL, tau 1", "moved step 1", 0.1)])
    assert [(c.row, c.column, c.value) for c in found] == [("ERM", LEAST_GAIN, 0.8), ("EL", LEAST_GAIN, 0.85)]
    assert found[1].count == 7
    assert least_gain([*erm[:2], *el]) == least_gain(erm) == least_gain([]) == []


@pytest.mark.usefixtures("tables")
def test_a_table_may_differ_by_scale_and_derive_cells(tmp_path: Path) -> None:
    table = replace(
        DIGITS,
        derived=lambda cells: [Cell("derived", "x", float(len(cells)))],
        scales={"smoke": {"about": "Shown at smoke.", "floor": replace(DIGITS.floor, least=0.01)}},
    )
    campaign = replace(digits(tmp_path), table=table)
    result = result_of(campaign, campaign.run(), "")
    assert {e["mean"] for e in result["table"] if e["row"] == "derived"} == {
        float(sum(e["mean"] is not None for e in result["table"]) - 1)
    }
    assert (result["floor"]["least"], DIGITS.at("smoke")) == (0.01, DIGITS)
    assert "Shown at smoke." in text_of(table, result) and table.at("small").about == DIGITS.about


def test_fine_tuning_is_judged_at_the_last_epoch_of_its_scale() -> None:
    for scale, last in (("smoke", 1), ("small", 10), ("paper", 100)):
        table = TABLES["robust-finetune"].at(scale)
        assert all(made.options["epochs"] == last for made in table.trials(scale))
        assert table.floor.column == f"cifar10 epoch {last}"
        assert {c.more[1].rpartition(" ")[2] for c in table.claims} == {"1", str(last)}


def test_the_twin_sees_as_many_images() -> None:
    recipe = Layerwise(num_blocks=4, epochs=5)
    assert twin(replace(recipe, compression=Compression(share=0.5, epochs=2))).epochs == 28
    assert (twin(recipe).together, twin(recipe).epochs, twin(recipe).compression.share) == (4, 20, None)
    assert twin(recipe, 4).epochs == 5
    assert twin(replace(recipe, epochs=(1, 1, 1, 5))).epochs == 8
    narrow = twin(replace(recipe, final_aux_width=16, downsample_at=(1, 2)))
    assert (narrow.aux_width, narrow.final_aux_width, narrow.epochs) == (4, None, 25)


def test_parameters_of_the_papers_networks() -> None:
    counts = {cell.row: cell.value / 1e6 for cell in TABLES["layerwise-imagenet"].fixed()}
    assert counts["for ImageNet: k=2"] == pytest.approx(64.4, abs=0.1)
    assert counts["for ImageNet: k=3"] == pytest.approx(102.1, abs=0.1)
    assert counts["for ImageNet: k=3, M~f=512"] == pytest.approx(46.4, abs=0.1)


def test_a_reduction_trains_the_last_layer_and_a_narrower_classifier(toy_data: LabelledData) -> None:
    base = Layerwise(k=2, width=4, num_blocks=2, downsample_at=(), epochs=1, augmentation="none")
    run = fit(base, toy_data, verbose=False)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    values = {name: value for name, value in vars(base).items() if name != "final_aux_width"}
    after = fit(Reduction(**values, final_aux_width=2), toy_data, run.model, verbose=False).model.state_dict()
    assert after["auxiliary.layer-2.hidden.0.conv.weight"].shape[0] == 2
    assert torch.equal(after["blocks.0.conv.weight"], before["blocks.0.conv.weight"])
    assert not torch.equal(after["blocks.1.conv.weight"], before["blocks.1.conv.weight"])


def test_as_many_rows_of_each_class() -> None:
    labels = np.repeat(np.arange(3), (5, 4, 9))
    assert np.bincount(labels[per_class(labels, 3, seed=0)]).tolist() == [3, 3, 3]


# The papers' recipes -----------------------------------------------------------------------------------------------

CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "tiny_imagenet32": 200,
    "caltech101": 101,
    "digit-pairs": 50,
    "mnist": 10,
    "fashion_mnist": 10,
    "grocery": 81,
    "patches": 128,
    "plantvillage": 15,
    "dbpedia": 219,
    "newsgroups20": 20,
}
TEXTS = ("dbpedia", "newsgroups20")
PAPER = [(name, t) for name, table in TABLES.items() for t in table.trials("paper")]
MOST = 4 << 30


def pictures(made: Trial, count: int = 40) -> LabelledData:
    """Noise of the shape of a set, labelled as far as the trial's rows are."""
    source, known = made.rows.source, made.rows.known or (0, 1)
    names = [(f"group {code % 5}", f"class {code}") for code in range(CLASSES[source])]
    if len(known) == 3:
        names = [(f"kind {code % 5 % 2}", *name) for code, name in enumerate(names)]
    taxonomy = Taxonomy.from_paths(names)
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8))
    if source in TEXTS:
        images = TextEncoding().encode([f"word{row} another{row % 7}" for row in range(count)])
    labels = taxonomy.encode([names[row % CLASSES[source]] for row in range(count)])
    ends = [level for level, rows in enumerate(known) if rows and (level + 1 == len(known) or not made.rows.fine_only)]
    for row in range(count):
        labels[row, ends[row % len(ends)] + 1 :] = -1
    return LabelledData(inputs=images, labels=labels, index=np.arange(count), taxonomy=taxonomy, name=source)


def backbone_of(made: Trial) -> str:
    return made.options.get("backbone", made.backbone)


@pytest.mark.parametrize(("name", "made"), PAPER, ids=[f"{name}: {t.row}" for name, t in PAPER])
def test_the_papers_recipes_fit_their_networks(name: str, made: Trial) -> None:
    """Every stage's forward pass, on the meta device."""
    data = pictures(made)
    with torch.device("meta"):
        model = build_model(
            data.taxonomy, data.image_shape, backbone_of(made), made.recipe.method, made.recipe.network()
        )
        for stage in made.recipe.stages(model, data):
            outputs = model(
                torch.empty((2, *data.image_shape), dtype=torch.int32 if made.rows.source in TEXTS else None),
                until=stage.until,
            )
            if stage.until in data.taxonomy.levels:
                assert outputs.logits[stage.until].shape == (2, len(data.taxonomy.classes[stage.until]))
            elif stage.until is not None:
                assert outputs.logits[stage.until].shape == (2, CLASSES[made.rows.source])
            if stage.assume is not None:
                stage.assume(model)


@pytest.mark.long
@pytest.mark.parametrize(("name", "made"), PAPER, ids=[f"{name}: {t.row}" for name, t in PAPER])
def test_the_papers_recipes_take_a_step(name: str, made: Trial) -> None:
    data = pictures(made)
    recipe = made.recipe
    with torch.device("meta"):
        model = build_model(data.taxonomy, data.image_shape, backbone_of(made), recipe.method, recipe.network())
    # Weights, their gradients and momentum, and what the step itself needs.
    if 16 * sum(p.numel() for p in model.parameters()) > MOST:
        pytest.skip("does not fit into 4 GB")
    # Proxies are made after the first half.
    recipe = replace(recipe, epochs=2 if isinstance(recipe, Coins) else 1, steps_per_epoch=1, batch_size=2)
    layers = 1
    if isinstance(recipe, Layerwise):
        layers = recipe.num_blocks // recipe.together
        recipe = replace(recipe, compression=replace(recipe.compression, epochs=1))
    run = fit(recipe, data, verbose=False, whole=made.whole, backbone=backbone_of(made))
    assert len(run.history) >= layers


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("name", "recipe"), [("cifar10", on_cifar), ("imagenet", on_imagenet)])
def test_the_written_recipes_are_those_that_are_run(name: str, recipe, k: int) -> None:
    path = Path(__file__).parent.parent / "recipes" / f"layerwise-{name}-k{k}.toml"
    settings = read_config(path)
    assert settings.pop("method") == "layerwise"
    assert apply(Layerwise(), settings) == recipe("paper", k)


def test_the_rival_s_step_size_is_chosen_on_validation_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the worst concept, ties by the mean; what the test rows would say is never asked."""
    worst = {0.01: (0.2, 0.9), 0.1: (0.5, 0.6), 1.0: (0.5, 0.7)}

    def accuracies(trial: Trial, found: Any, data: str) -> tuple[dict[str, float], None]:
        assert data == "validation rows"
        return dict(zip(("worst", "mean"), worst[found.eta])), None

    monkeypatch.setattr(
        robust_measures,
        "trained",
        lambda trial, place: SimpleNamespace(eta=trial.recipe.eta, validation="validation rows", test="test rows"),
    )
    monkeypatch.setattr(robust_measures, "accuracies_of", accuracies)
    (rival,) = (made for made in TABLES["robust-concepts"].trials("small") if made.row == "group DRO")
    eta, found = robust_measures.by_validation(rival, None, rival.options["eta"])  # type: ignore[arg-type]
    assert (eta, found.eta) == (1.0, 1.0)
    assert TABLES["robust-concepts"].trials("small")[0].options == {}
