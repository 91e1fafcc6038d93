"""What an attack costs: DeepFool, paired with foolbox's on the same network and images."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from loops import Size
from paired import Row
from search import paired
from torch import Tensor, nn

from nestling.data.sources import load_data
from nestling.evaluate import attacks

ROWS, STEPS, BATCH = 1_000, 250, 64


def deepfool(folder: Path, size: Size) -> Row:
    """The same 1,000 rows, labels, steps and candidates on both sides, and one network that takes no gradient."""
    try:
        with warnings.catch_warnings():
            # It asks SciPy for an old name.
            warnings.simplefilter("ignore", DeprecationWarning)
            import foolbox
    except ImportError as error:
        raise SystemExit("the row 'deepfool' needs foolbox: pip install 'nestling[bench]'") from error

    tiny = size.rounds <= 3
    source, rows, steps = ("digits", 20, 5) if tiny else ("mnist", ROWS, STEPS)
    net = trained(source, steps)
    test = load_data(source, "test", first=rows)
    images, labels = test.images(test.index[:rows]).float() / 255, torch.from_numpy(test.labels[:rows, -1])
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")

    def theirs() -> None:
        foolbox.attacks.L2DeepFoolAttack(steps=attacks.STEPS)(model, images, labels, epsilons=None)

    text = f"DeepFool on {rows:,} images of {source}, over foolbox's"
    return paired("deepfool", text, lambda: attacks.deepfool(net, images, labels), theirs, size, 1.0)


def trained(source: str, steps: int) -> nn.Module:
    """A small network of two convolutions, which so many steps have taught the set."""
    data = load_data(source, "train", first=steps * BATCH)
    images = data.images(data.index).float() / 255
    labels = torch.from_numpy(data.labels[:, -1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        side = images.shape[-1] // 4
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * side * side, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        batches: tuple[Tensor, ...] = torch.randperm(len(images)).split(BATCH)
        for rows in batches[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)
