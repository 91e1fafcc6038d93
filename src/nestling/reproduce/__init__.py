"""The tables of the papers, by name: ``nestling reproduce NAME``."""

from nestling.reproduce.layerwise_cifar import CIFAR10, COMPRESSION, DOWNSAMPLING, SEPARABILITY, UNCONVERGED
from nestling.reproduce.layerwise_imagenet import IMAGENET, REDUCE, TRANSFER, WIDTH
from nestling.reproduce.layerwise_memory import MEMORY
from nestling.reproduce.table import Table

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        CIFAR10,
        SEPARABILITY,
        DOWNSAMPLING,
        WIDTH,
        UNCONVERGED,
        REDUCE,
        COMPRESSION,
        TRANSFER,
        MEMORY,
        IMAGENET,
    )
}
