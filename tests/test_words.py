"""The linear model of words beside a text network: its weights are scikit-learn's, its table follows its gradient."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from nestling.data.batch import Batch
from nestling.data.text import BUCKETS, TextEncoding
from nestling.engine.optim import build_optimizer, set_rate
from nestling.methods.recipe import Optimizer
from nestling.models.build import build_model
from nestling.models.nested import NestedModel
from nestling.models.search import SearchModel
from nestling.models.text import READ, TextBackbone
from nestling.models.words import (
    HASHED,
    NETWORK,
    SCALE,
    SHARE,
    WIDEST,
    AlongGradient,
    LinearWords,
    Reading,
    hashed,
    is_first,
)
from nestling.objectives.self_training import SelfTraining
from nestling.objectives.terms import CrossEntropy, MarginalCrossEntropy, Term
from nestling.taxonomy import Taxonomy

TEXTS = ["red red red car", "blue car and red bus", "green tree", "green green grass and tree and sun"]
WIDTHS = {"coarse": 2, "fine": 4}
TREE = Taxonomy.from_paths(["x/a", "x/b", "y/c", "y/d"])
LABELS = torch.tensor([[0, 0], [1, 2], [1, -1], [0, 1]])


@pytest.fixture
def model() -> LinearWords:
    return LinearWords(WIDTHS)


def counted(model: LinearWords, texts: torch.Tensor) -> LinearWords:
    """Its document frequencies are those of the texts."""
    model.train()(texts)
    return model.eval()


def dense(model: LinearWords, texts: torch.Tensor) -> np.ndarray:
    """The weights by bucket (n, BUCKETS)."""
    words = texts[:, 0, 0].long().clamp_min(0).sort(1).values
    return torch.zeros(len(words), BUCKETS).scatter_add_(1, words, model.weights(words, is_first(words))).numpy()


def test_weights_are_those_of_scikit_learn(model: LinearWords) -> None:
    """Each text by itself, exactly as long as it is; frequencies over all of them."""
    longest = TextEncoding(7).encode(TEXTS)
    counted(model, longest)
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    theirs = vectorizer.fit_transform(TEXTS).toarray()
    for number, text in enumerate(TEXTS):
        ours = dense(model, TextEncoding(len(text.split())).encode([text]))[0]
        assert sorted(ours[ours > 0]) == pytest.approx(sorted(theirs[number][theirs[number] > 0]), abs=1e-6)
    names = vectorizer.get_feature_names_out()
    red = TextEncoding(1).encode(["red"])[0, 0, 0, 0].item()
    ours = dense(model, TextEncoding(4).encode(TEXTS[:1]))[0]
    assert ours[red] == pytest.approx(theirs[0][list(names).index("red")], abs=1e-6)


def test_repeated_and_unseen_words_do_not_count(model: LinearWords) -> None:
    counted(model, TextEncoding(7).encode(TEXTS))
    once, *others = (dense(model, TextEncoding(length).encode(TEXTS[1:2])) for length in (5, 7, 8, 13))
    assert (once > 0).sum() == 5 and all(np.array_equal(once, other) for other in others)
    strange = dense(model, TextEncoding(8).encode([TEXTS[1] + " zebra"]))
    assert np.array_equal(once, strange)


def test_scores_are_linear_in_the_weights(model: LinearWords) -> None:
    texts = TextEncoding(9).encode([*TEXTS, ""])
    assert all(bool((scores == 0).all()) for scores in model(texts).values()), "not 0 before the first step"
    counted(model, texts)
    torch.nn.init.normal_(model.table)
    scores = model(texts)
    weight = (model.table @ model.directions.T).detach().numpy()
    wanted = SCALE * dense(model, texts) @ weight
    found = torch.cat([scores["coarse"], scores["fine"]], 1).detach().numpy()
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-3) and not found[-1].any() and found[:-1].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(texts)["fine"], scores["fine"])


@pytest.mark.parametrize("fine", [4, 2 * WIDEST])
def test_directions(fine: int) -> None:
    model = LinearWords({"coarse": 2, "fine": fine})
    products = model.directions @ model.directions.T
    assert torch.allclose(products.diagonal(), torch.ones(2 + fine), atol=1e-5)
    assert model.table.shape == (BUCKETS, min(2 + fine, WIDEST))
    if 2 + fine <= WIDEST:
        assert torch.allclose(products, torch.eye(2 + fine), atol=1e-5)
    assert model(TextEncoding(3).encode(["a word"]))["fine"].shape == (1, fine)


def test_hashed_words_keep_the_products_of_texts(model: LinearWords) -> None:
    words = [f"w{number}" for number in range(400)]
    texts = TextEncoding(300).encode([" ".join(words[start : start + 200]) for start in (0, 50, 100, 200)])
    counted(model, texts)
    weights, found = torch.from_numpy(dense(model, texts)), hashed(model.read(texts))
    assert found.shape == (4, HASHED) and torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-5)
    # Of 1,024 numbers a product is told to about 1 / 32.
    assert (found @ found.T - weights @ weights.T).abs().max() < 0.1
    assert not hashed(model.read(TextEncoding(5).encode([""]))).any()


def test_places_and_signs_are_even() -> None:
    every = torch.arange(1, BUCKETS)[:, None]
    found = hashed(Reading(every, torch.ones(every.shape)))
    places, signs = found.abs().argmax(1), found.sum(1)
    assert places.bincount(minlength=HASHED).max() < 2 * BUCKETS / HASHED and abs(signs.mean()) < 0.02
    assert abs(torch.corrcoef(torch.stack([signs[:-1], signs[1:]]))[0, 1]) < 0.05


@pytest.mark.parametrize("method", ["nested", "flat-marginal", "coins"])
def test_search_compares_words_too(method: str) -> None:
    """As do nested learning and the baselines, of the same frequencies as their linear model."""
    model = build_model(TREE, TextEncoding().shape, "text:6/8", method)
    assert isinstance(model, NestedModel | SearchModel) and model.words is not None
    texts = TextEncoding().encode([*TEXTS, "grass and a tree"])
    model.train()(texts)
    found = model.eval()(texts).embedding
    assert found.shape == (5, 8 + HASHED) and torch.equal(found[:, 8:], hashed(model.words.read(texts)))
    assert torch.allclose(found[:, :8].norm(dim=1), torch.full((5,), SHARE), atol=1e-5)
    alike = found[:, 8:] @ found[:, 8:].T
    assert alike[4, :4].argmax() == 3 and alike[0, 1] > alike[0, 2]


def test_only_training_counts_documents(model: LinearWords) -> None:
    texts = TextEncoding(9).encode([*TEXTS, ""])
    model.eval()(texts)
    model.table.requires_grad_(False)
    model.train()(texts)
    assert not model.documents.any()
    model.table.requires_grad_(True)
    model(texts)
    car = TextEncoding(1).encode(["car"])[0, 0, 0, 0]
    assert model.documents[0] == 5 and model.documents[car] == 2 and model.documents.sum() == 5 + 14


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_table_follows_its_gradient(model: LinearWords, name: str) -> None:
    """Two words whose gradients differ a hundredfold move a hundredfold apart; under Adam others move alike."""
    other = torch.nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(Optimizer(name=name, weight_decay=0), 0.1, [*other.parameters(), *model.parameters()])
    set_rate(optimizer, 0.1)
    before = other.weight.detach().clone()
    gradient = torch.zeros_like(model.table)
    gradient[5, 0], gradient[6, 0] = 1.0, 1e-2
    model.table.grad, other.weight.grad = gradient, torch.tensor([[1.0, 1e-2]])
    optimizer.step()
    moved = model.table.detach()
    assert moved[5, 0] == pytest.approx(-0.1 * (0.003 if name == "sgd" else 1), rel=0.02)
    assert moved[5, 0] / moved[6, 0] == pytest.approx(100, rel=0.02) and moved[5, 0] < 0
    steps = (other.weight - before).detach()[0]
    assert steps[0] / steps[1] == pytest.approx(100 if name == "sgd" else 1, rel=0.02)


def test_scores_join_logits_and_features() -> None:
    model = build_model(TREE, TextEncoding().shape, "text:6/8").eval()
    assert isinstance(model, NestedModel) and model.words is not None
    texts = TextEncoding().encode(TEXTS)
    without = model(texts)
    own = model.head["fine"](without.features["fine"][:, :-4])
    assert torch.allclose(without.logits["fine"], NETWORK * own, atol=1e-6)
    torch.nn.init.normal_(model.words.table)
    words, found = model.words(texts), model(texts)
    for level, width in WIDTHS.items():
        assert torch.allclose(found.logits[level], without.logits[level] + words[level], rtol=1e-4, atol=1e-3)
        assert torch.equal(found.features[level][:, -width:], words[level].softmax(1))
    assert all(model.words in model.parts(level) for level in WIDTHS)


@pytest.mark.parametrize("term", [CrossEntropy("fine"), MarginalCrossEntropy("fine", TREE)])
def test_each_part_learns_as_if_it_stood_alone(term: Term) -> None:
    """The table by the linear loss, the head by the network's: what one of them knows the other learns, too."""
    model = build_model(TREE, TextEncoding().shape, "text:6/8").eval()
    assert isinstance(model, NestedModel) and model.words is not None
    batch = Batch(TextEncoding().encode(TEXTS), LABELS, torch.arange(4), TREE.levels)
    counted(model.words, batch.inputs)
    torch.nn.init.normal_(model.words.table, std=0.01)
    outputs = model(batch.inputs)
    found, counts = term(outputs, batch)
    network, linear = outputs.apart["fine"]
    alone = [term(replace(outputs, apart={}, logits={"fine": part}), batch)[0] for part in (network, linear)]
    assert torch.allclose(found, alone[0] + alone[1]) and counts.sum() >= 3
    for parameter, loss in ((model.head["fine"].weight, alone[0]), (model.words.table, alone[1])):
        both, own = (torch.autograd.grad(part.sum(), parameter, retain_graph=True)[0] for part in (found, loss))
        assert own.abs().max() > 0 and torch.allclose(both, own, rtol=1e-4, atol=1e-6)


def test_guesses_teach_each_part() -> None:
    model = build_model(TREE, TextEncoding().shape, "text:6/8")
    assert isinstance(model, NestedModel) and model.words is not None
    batch = Batch(TextEncoding().encode(TEXTS), torch.full((4, 2), -1), torch.arange(4), TREE.levels)
    counted(model.words, batch.inputs)
    torch.nn.init.normal_(model.words.table, std=0.01)
    term = SelfTraining(model.eval())
    outputs = model(batch.inputs)
    values, counts = term(outputs, batch)
    guess = model.answers(outputs, reject=False).combined
    wanted = sum(
        -(guess[level] * part.log_softmax(1)).sum(1) for level in WIDTHS for part in outputs.apart[level]
    )  # fmt: skip
    assert counts.all() and torch.allclose(values, wanted, rtol=1e-4)


def test_convolutions_read_the_beginning_and_the_linear_model_all(model: LinearWords) -> None:
    same = "red car " * (READ // 2)
    texts = TextEncoding().encode([same + "red tree", same + "red grass"])
    network = TextBackbone([6, 8]).eval()
    for map_ in network(texts):
        assert torch.equal(map_[0], map_[1])
    assert network(texts)[0].shape == (2, 6, 1, READ)
    torch.nn.init.normal_(model.table)
    scores = counted(model, texts)(texts)["fine"]
    assert not torch.allclose(scores[0], scores[1])


def test_a_copy_is_moved_alike(model: LinearWords) -> None:
    assert isinstance(copy.deepcopy(model).table, AlongGradient)
