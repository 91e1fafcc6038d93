"""The tables of the papers, by name: ``nestling reproduce NAME``."""

from nestling.reproduce.coins_choice import CHOICE
from nestling.reproduce.coins_imagenet import IMAGENET as COINS_IMAGENET
from nestling.reproduce.coins_patches import PATCHES
from nestling.reproduce.coins_search import CIFAR100, GROCERY, SMALL
from nestling.reproduce.coins_theory import THEORY
from nestling.reproduce.layerwise_cifar import CIFAR10, DOWNSAMPLING, SEPARABILITY
from nestling.reproduce.layerwise_imagenet import IMAGENET, REDUCE, TRANSFER, WIDTH
from nestling.reproduce.layerwise_memory import MEMORY
from nestling.reproduce.layerwise_remarks import CLOSING, COMPRESSION, UNCONVERGED
from nestling.reproduce.nested_ablations import CASCADE, SKIPS
from nestling.reproduce.nested_attacks import ATTACKS_TABLE
from nestling.reproduce.nested_distortion import BUDGET, DISTORTION
from nestling.reproduce.nested_table1 import TABLE1
from nestling.reproduce.nested_text import TEXT
from nestling.reproduce.robust_concepts import AUGMENTATION, CONCEPTS, CONTROL, SCHEDULE
from nestling.reproduce.robust_transfer import FINETUNE
from nestling.reproduce.robust_transfer import TRANSFER as ROBUST_TRANSFER
from nestling.reproduce.table import Table

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        CIFAR10,
        CLOSING,
        SEPARABILITY,
        DOWNSAMPLING,
        WIDTH,
        UNCONVERGED,
        REDUCE,
        COMPRESSION,
        TRANSFER,
        MEMORY,
        IMAGENET,
        ROBUST_TRANSFER,
        CONCEPTS,
        AUGMENTATION,
        FINETUNE,
        SCHEDULE,
        CONTROL,
        CIFAR100,
        SMALL,
        GROCERY,
        CHOICE,
        COINS_IMAGENET,
        PATCHES,
        THEORY,
        TABLE1,
        DISTORTION,
        BUDGET,
        ATTACKS_TABLE,
        SKIPS,
        CASCADE,
        TEXT,
    )
}
