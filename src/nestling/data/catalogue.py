"""The sets that nestling knows by name: levels, where the hub has them, licence.

A set is read from ``<data dir>/<name>/<split>.parquet`` where that exists, with the level columns named here. A hub
name stands here only where repository and columns are certain; ``docs/data.md`` says by what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

CMF = ("coarse", "middle", "fine")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One known set."""

    about: str
    levels: tuple[str, ...]
    """Columns, coarse to fine."""
    licence: str
    hub: str | None = None
    """``owner/name`` on the hub."""
    hub_columns: Mapping[str, str] = field(default_factory=dict)
    """From the hub's columns to ours."""
    hub_folder: str | None = None
    """Which one, where several configurations stand side by side."""
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    """From the hub's splits to ours, where these differ; those not named are left."""
    paths: tuple[tuple[str, ...], ...] = ()
    """Where the hub has the finest label alone: the path of every class, in the order of the hub's codes."""
    of: str | None = None
    """The set whose files it is made from, where that is another."""
    num_train: int | None = None
    """Where the rows are split anew: so many, drawn at random, train; a class with one other row is not tested."""


_C1, _C2 = "coarse1 (0,3,5,6,8)", "coarse2 (1,2,4,7,9)"
_M1, _M2, _M3, _M4 = "middle1 (3,5,8)", "middle2 (0,6)", "middle3 (4,7,9)", "middle4 (1,2)"
DIGIT_PATHS = (
    (_C1, _M2, "0"),
    (_C2, _M4, "1"),
    (_C2, _M4, "2"),
    (_C1, _M1, "3"),
    (_C2, _M3, "4"),
    (_C1, _M1, "5"),
    (_C1, _M2, "6"),
    (_C2, _M3, "7"),
    (_C1, _M1, "8"),
    (_C2, _M3, "9"),
)
"""Table 2 of the nested paper, for MNIST: the path of every digit. The names are ours."""

_UPPER, _OTHER = "upper-body clothes", "shoes, trousers, bags"
_FASHION_PATHS = (
    (_UPPER, "shirt, t-shirt, dress", "T-shirt"),
    (_OTHER, "trouser, bag", "Trouser"),
    (_UPPER, "coat, pullover", "Pullover"),
    (_UPPER, "shirt, t-shirt, dress", "Dress"),
    (_UPPER, "coat, pullover", "Coat"),
    (_OTHER, "shoes", "Sandal"),
    (_UPPER, "shirt, t-shirt, dress", "Shirt"),
    (_OTHER, "shoes", "Sneaker"),
    (_OTHER, "trouser, bag", "Bag"),
    (_OTHER, "shoes", "Ankle boot"),
)
_CIFAR10_PATHS = (
    ("vehicle", "plane or ship", "airplane"),
    ("vehicle", "road vehicle", "automobile"),
    ("animal", "bird or frog", "bird"),
    ("animal", "cat or dog", "cat"),
    ("animal", "deer or horse", "deer"),
    ("animal", "cat or dog", "dog"),
    ("animal", "bird or frog", "frog"),
    ("animal", "deer or horse", "horse"),
    ("vehicle", "plane or ship", "ship"),
    ("vehicle", "road vehicle", "truck"),
)

_NEWSGROUPS = (
    ("religion", "alt.atheism"),
    *(
        ("computers", f"comp.{name}")
        for name in ("graphics", "os.ms-windows.misc", "sys.ibm.pc.hardware", "sys.mac.hardware", "windows.x")
    ),
    ("for sale", "misc.forsale"),
    *(("recreation", f"rec.{name}") for name in ("autos", "motorcycles", "sport.baseball", "sport.hockey")),
    *(("science", f"sci.{name}") for name in ("crypt", "electronics", "med", "space")),
    ("religion", "soc.religion.christian"),
    *(("politics", f"talk.politics.{name}") for name in ("guns", "mideast", "misc")),
    ("religion", "talk.religion.misc"),
)

CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {
        "digits": Entry(
            about="scikit-learn's 1,797 handwritten digits, 8x8 grey, installed with it; tree of the nested paper",
            levels=CMF,
            licence="BSD-3-Clause (scikit-learn); digits: UCI, CC BY 4.0",
        ),
        "digit-pairs": Entry(
            about="two of those digits side by side, 8x16: the left one is the coarse class, both are the fine one",
            levels=("coarse", "fine"),
            licence="BSD-3-Clause (scikit-learn); digits: UCI, CC BY 4.0",
        ),
        "patches": Entry(
            about="512 images of 64x64 of a big and a small patch, made after Figure 1 of the coins paper",
            levels=("coarse", "fine"),
            licence="Apache-2.0 (made by nestling)",
        ),
        "mnist": Entry(
            about="70,000 handwritten digits, 28x28 grey; tree of the nested paper's Table 2",
            levels=CMF,
            licence="MNIST (LeCun et al.)",
            hub="ylecun/mnist",
            hub_columns={"label": "fine"},
            paths=DIGIT_PATHS,
        ),
        "fashion_mnist": Entry(
            about="70,000 articles of clothing, 28x28 grey; tree of the nested paper's Table 2",
            levels=CMF,
            licence="MIT (Zalando)",
            hub="zalando-datasets/fashion_mnist",
            hub_columns={"label": "fine"},
            paths=_FASHION_PATHS,
        ),
        "cifar10": Entry(
            about="60,000 photographs, 32x32; tree of the nested paper's Table 2",
            levels=CMF,
            licence="CIFAR (Krizhevsky 2009)",
            hub="uoft-cs/cifar10",
            hub_columns={"img": "image", "label": "fine"},
            paths=_CIFAR10_PATHS,
        ),
        "cifar100": Entry(
            about="60,000 photographs, 32x32; 20 superclasses, 100 classes",
            levels=("coarse", "fine"),
            licence="CIFAR (Krizhevsky 2009)",
            hub="uoft-cs/cifar100",
            hub_columns={"img": "image", "coarse_label": "coarse", "fine_label": "fine"},
        ),
        "plantvillage": Entry(
            about="8,650 leaves of pepper, potato and tomato, 64x64; plant, health and disease",
            levels=CMF,
            licence="PlantVillage (Hughes & Salathé 2015)",
        ),
        "grocery": Entry(
            about="5,421 natural images of groceries, 64x64, with a validation split",
            levels=CMF,
            licence="MIT (Klasson et al.)",
        ),
        "newsgroups20": Entry(
            about="18,846 articles of 20 newsgroups",
            levels=("coarse", "fine"),
            licence="20 newsgroups (1993)",
            hub="SetFit/20_newsgroups",
            hub_columns={"label_text": "fine"},
            paths=_NEWSGROUPS,
        ),
        "tiny_imagenet32": Entry(
            about="35,000 images of 200 ImageNet classes, 32x32; unbalanced concepts after BREEDS and WordNet",
            levels=CMF,
            licence="Tiny ImageNet (Stanford CS231n, from ImageNet)",
        ),
        "dbpedia": Entry(
            about="abstracts of Wikipedia articles; 9, 70 and 219 classes",
            levels=CMF,
            licence="CC BY-SA (DBpedia)",
            hub="DeveloperOats/DBPedia_Classes",
            hub_columns={"l1": "coarse", "l2": "middle", "l3": "fine"},
        ),
        "caltech101": Entry(
            about="5,975 images of 101 categories, 64x64; one level and no test split",
            levels=("fine",),
            licence="Caltech-101 (Fei-Fei et al. 2004)",
        ),
        "svhn": Entry(
            about="99,289 digits of house numbers, 32x32; one level",
            levels=("fine",),
            licence="SVHN (Netzer et al. 2011), not for commercial use",
            hub="ufldl-stanford/svhn",
            hub_columns={"label": "fine"},
            hub_folder="cropped_digits",
        ),
        "sop": Entry(
            about="Stanford Online Products: 120,053 pictures, 12 kinds, 22,634 products; those tested are not trained",
            levels=("coarse", "fine"),
            licence="Stanford Online Products (Song et al. 2016)",
        ),
        "sop_random": Entry(
            about="the same pictures, 80,000 drawn at random to train; products with one other picture not tested",
            levels=("coarse", "fine"),
            licence="Stanford Online Products (Song et al. 2016)",
            of="sop",
            num_train=80_000,
        ),
        "imagenet": Entry(
            about="ILSVRC 2012: 1,281,167 photographs to train and 50,000 to test, 1,000 classes; one level",
            levels=("fine",),
            licence="ImageNet's terms of access: research, not for commercial use",
            hub="ILSVRC/imagenet-1k",
            hub_columns={"label": "fine"},
            hub_splits={"train": "train", "validation": "test"},
        ),
    }
)
