"""Inputs, labels of any granularity, and where they come from."""

from nestling.data.batch import Batch as Batch
from nestling.data.catalogue import CATALOGUE as CATALOGUE
from nestling.data.catalogue import Entry as Entry
from nestling.data.dataset import LabelledData as LabelledData
from nestling.data.images import LazyImages as LazyImages
from nestling.data.images import find_images as find_images
from nestling.data.images import read_images as read_images
from nestling.data.sources import available_splits as available_splits
from nestling.data.sources import has_split as has_split
from nestling.data.sources import load_data as load_data
from nestling.data.split import cut as cut
