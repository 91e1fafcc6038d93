"""Distortions against scipy.ndimage, plain loops and hand-made images; the counter-based generator against integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.ndimage import gaussian_filter, map_coordinates

from nestling import functional as public
from nestling.data import counter
from nestling.data.distortions import displace, parse_distortion, turbulence
from nestling.errors import UsageError

SPECS = ("turbulence:1.5,0.8", "half:top", "half:bottom", "occlude", "mirror", "blur:1", "noise:0.3", "shift:0.2",
         "shift:-0.2", "negative")  # fmt: skip


def some_images(rows: int = 4, channels: int = 2, height: int = 9, width: int = 12) -> torch.Tensor:
    return torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(0))


def splitmix64(state: int) -> int:
    """The published generator's output function, in Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


GOLDEN = 0x9E3779B97F4A7C15


def bits(key: int, row: int, column: int) -> int:
    start = splitmix64((splitmix64(row * GOLDEN % 2**64) + key * GOLDEN + 1) % 2**64)
    return splitmix64((start + (column + 1) * GOLDEN) % 2**64)


def test_counter_equals_splitmix64() -> None:
    # The first output of the published generator for seed 0.
    assert splitmix64(GOLDEN) == 0xE220A8397B1DCDAF
    rows = [0, 1, 17, 2**40 + 3]
    for key in (0, 1, 2**62 + 12345):
        ours = counter.uniform(key, torch.tensor(rows), 5)
        expected = [[(bits(key, row, column) >> 40) / 2**24 for column in range(5)] for row in rows]
        assert ours.tolist() == expected


def test_normal_is_box_muller() -> None:
    ours = counter.normal(5, torch.tensor([7]), 4)[0].tolist()
    expected = []
    for column in range(2):
        drawn = bits(5, 7, column)
        radius = math.sqrt(-2 * math.log(((drawn >> 40) + 1) / 2**24))
        angle = 2 * math.pi * ((drawn >> 16) % 2**24) / 2**24
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    assert ours == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("draw", [counter.uniform, counter.normal])
def test_a_row_does_not_depend_on_its_batch(draw) -> None:
    alone = draw(3, torch.tensor([42]), 7)
    among = draw(3, torch.tensor([5, 42, 41]), 10)
    assert torch.equal(alone[0], among[1, :7])
    assert not torch.equal(among[0], among[1])
    assert not torch.equal(draw(4, torch.tensor([42]), 7), alone)
    assert draw(3, torch.zeros(0, dtype=torch.int64), 7).shape == (0, 7)


def test_draws_have_their_distributions() -> None:
    rows = torch.arange(2000)
    uniform, normal = counter.uniform(1, rows, 20).double(), counter.normal(1, rows, 20).double()
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > 0.01
    assert stats.kstest(normal.flatten(), "norm").pvalue > 0.01
    for draws in (uniform, normal):
        # Neighbouring rows and columns are not correlated: the largest of 780 correlations of 2,000 pairs is below 0.1.
        for matrix in (torch.corrcoef(draws.T), torch.corrcoef(draws.view(20, 2000))):
            assert float((matrix - torch.eye(20)).abs().max()) < 0.1


def test_counter_refuses_other_rows() -> None:
    with pytest.raises(UsageError, match=r"expected rows \(b,\) int64"):
        counter.uniform(0, torch.zeros(3), 2)
    with pytest.raises(UsageError, match=r"expected rows \(b,\) int64"):
        counter.normal(0, torch.zeros(3, 1, dtype=torch.int64), 2)


@pytest.mark.parametrize(("smoothness", "strength"), [(0, 1.0), (0.3, 0.7), (1, 0.5), (2.5, 2.0), (9, 3.0), (12, 1.0)])
def test_turbulence_equals_scipy(smoothness: float, strength: float) -> None:
    images = some_images().double()
    noise = torch.randn(4, 2, 9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = displace(images, noise, smoothness, strength).numpy()
    y, x = np.mgrid[:9, :12]
    for row in range(4):
        fields = []
        for field in noise[row].numpy():
            field = gaussian_filter(field, smoothness) if smoothness else field
            fields.append((field - field.mean()) / field.std() * strength)
        for channel in range(2):
            image = images[row, channel].numpy()
            reference = map_coordinates(image, [y + fields[1], x + fields[0]], order=1, mode="nearest")
            np.testing.assert_allclose(ours[row, channel], reference, atol=1e-9)


def test_turbulence_by_hand() -> None:
    # Without smoothing (-1, 1, -1, 1) is already centred with deviation 1: every pixel takes the half-way value.
    image = torch.tensor([[[[0.0, 0.2, 0.6, 1.0]]]])
    noise = torch.tensor([[[[-1.0, 1.0, -1.0, 1.0]], [[0.0, 0.0, 0.0, 0.0]]]])
    torch.testing.assert_close(displace(image, noise, 0, 0.5), torch.tensor([[[[0.0, 0.4, 0.4, 1.0]]]]))


def test_turbulence_without_strength_is_the_image() -> None:
    images = some_images()
    assert torch.equal(public.turbulence(images, 2, 0), images)
    assert torch.equal(turbulence(images[..., :1, :1], 1, 3), images[..., :1, :1])
    assert turbulence(images[:0], 1, 1).shape == (0, 2, 9, 12)


def test_turbulence_draws_from_its_generator_alone() -> None:
    images = some_images()
    before = torch.get_rng_state()
    first = turbulence(images, 1, 1, torch.Generator().manual_seed(5))
    assert torch.equal(first, turbulence(images, 1, 1, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, turbulence(images, 1, 1, torch.Generator().manual_seed(6)))
    assert torch.equal(turbulence(images, 1, 1), turbulence(images, 1, 1))
    assert torch.equal(torch.get_rng_state(), before)
    same = turbulence(images[:1].expand(4, -1, -1, -1), 1, 1)
    assert not torch.equal(same[0], same[1])


def test_turbulence_refuses_what_cannot_be() -> None:
    images = some_images()
    with pytest.raises(UsageError, match=r"must lie in \[0, 12\] pixels for images of 9 x 12, got 13"):
        turbulence(images, 13, 1)
    with pytest.raises(UsageError, match="got -1"):
        turbulence(images, -1, 1)
    for strength in (-1, math.inf, math.nan):
        with pytest.raises(UsageError, match="strength of a turbulence"):
            turbulence(images, 1, strength)
    with pytest.raises(UsageError, match=r"expected float images \(b, c, h, w\), got \(9, 12\)"):
        turbulence(images[0, 0], 1, 1)
    with pytest.raises(UsageError, match=r"torch\.uint8"):
        turbulence(images.to(torch.uint8), 1, 1)
    with pytest.raises(UsageError, match=r"expected noise \(4, 2, 9, 12\)"):
        displace(images, torch.zeros(4, 1, 9, 12), 1, 1)


def apply(spec: str, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return parse_distortion(spec)(images, torch.arange(len(images)), seed)


@pytest.mark.parametrize("spec", SPECS)
def test_every_distortion_keeps_shape_and_range(spec: str) -> None:
    images = some_images()
    before = images.clone()
    distorted = apply(spec, images)
    assert distorted.shape == images.shape and distorted.dtype == images.dtype
    assert 0 <= float(distorted.min()) <= float(distorted.max()) <= 1
    assert not torch.equal(distorted, images)
    assert torch.equal(images, before)
    assert apply(spec, images[:0]).shape == (0, 2, 9, 12)


@pytest.mark.parametrize("spec", SPECS)
def test_a_distortion_does_not_depend_on_the_batch(spec: str) -> None:
    images, rows = some_images(), torch.tensor([11, 3, 8, 100])
    distortion = parse_distortion(spec)
    together = distortion(images, rows)
    torch.testing.assert_close(distortion(images[2:3], rows[2:3])[0], together[2], rtol=0, atol=1e-6)
    assert torch.equal(distortion(images, rows), together)
    random = spec.partition(":")[0] in ("turbulence", "occlude", "noise")
    assert torch.equal(distortion(images, rows, seed=1), together) is not random
    assert torch.equal(distortion(images, rows + 1), together) is not random


def test_stronger_turbulence_is_the_same_one() -> None:
    # In a ramp the value is the place: three times the strength moves every pixel three times as far.
    ramp = (torch.arange(32.0) / 31).expand(1, 1, 32, 32)
    weak, strong = apply("turbulence:2,0.5", ramp) - ramp, apply("turbulence:2,1.5", ramp) - ramp
    inside = slice(8, 24)
    torch.testing.assert_close(strong[..., inside], 3 * weak[..., inside], rtol=1e-3, atol=1e-5)


def test_halves_by_hand() -> None:
    image = torch.ones(1, 1, 3, 2)
    assert apply("half:top", image)[0, 0, :, 0].tolist() == [0, 1, 1]
    assert apply("half:bottom", image)[0, 0, :, 0].tolist() == [1, 1, 0]
    assert apply("half:top", torch.ones(1, 1, 4, 2))[0, 0, :, 0].tolist() == [0, 0, 1, 1]


def test_occlusion_hides_a_half_plane_through_the_centre() -> None:
    hidden = apply("occlude", torch.ones(200, 1, 20, 20))[:, 0] == 0
    assert torch.equal(hidden.sum((1, 2)), torch.full((200,), 200))
    # A pixel and the one opposite: exactly one of them is hidden.
    assert bool((hidden ^ hidden.flip(1, 2)).all())
    # Hidden left, right, top and bottom about equally often, so any angle is drawn.
    share = hidden.float().mean(0)
    assert float((share - 0.5).abs().max()) < 0.15


def test_simple_distortions_by_hand() -> None:
    image = torch.tensor([[[[0.0, 0.25], [0.5, 1.0]]]])
    assert apply("mirror", image).tolist() == [[[[0.25, 0.0], [1.0, 0.5]]]]
    assert apply("negative", image).tolist() == [[[[1.0, 0.75], [0.5, 0.0]]]]
    assert apply("shift:0.5", image).tolist() == [[[[0.5, 0.75], [1.0, 1.0]]]]
    assert apply("shift:-0.25", image).tolist() == [[[[0.0, 0.0], [0.25, 0.75]]]]
    assert apply("noise:0", image).tolist() == image.tolist()
    assert apply("blur:0", image).tolist() == image.tolist()


@pytest.mark.parametrize("smoothness", [0.4, 1, 2.3, 12])
def test_blur_equals_scipy(smoothness: float) -> None:
    images = some_images()
    reference = gaussian_filter(images.numpy(), (0, 0, smoothness, smoothness))
    np.testing.assert_allclose(apply(f"blur:{smoothness}", images), reference, atol=1e-5)


def test_noise_has_its_deviation() -> None:
    noise = apply("noise:0.05", torch.full((50, 1, 20, 20), 0.5)) - 0.5
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.002)


@given(st.floats(0, 8), st.floats(0, 8))
def test_what_is_parsed_is_what_was_said(smoothness: float, strength: float) -> None:
    spec = f"turbulence:{smoothness!r},{strength!r}"
    distortion = parse_distortion(f" {spec} ")
    assert (distortion.name, distortion.spec, distortion.arguments) == ("turbulence", spec, (smoothness, strength))


@pytest.mark.parametrize(
    "spec",
    [
        "turbulence",
        "turbulence:1",
        "turbulence:1,2,3",
        "turbulence:-1,1",
        "turbulence:1,-1",
        "turbulence:a,1",
        "turbulence:nan,1",
        "turbulence:1,inf",
        "half",
        "half:left",
        "occlude:1",
        "mirror:top",
        "blur:-1",
        "blur:",
        "noise:-0.1",
        "noise:1,2",
        "shift:2",
        "shift:nan",
        "negative:0",
    ],
)
def test_impossible_specs_are_refused(spec: str) -> None:
    with pytest.raises(UsageError, match=r"impossible distortion .*: expected "):
        parse_distortion(spec)


def test_unknown_distortions_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"unknown distortion turbulenz:1,2: expected one of 'turbulence:S,T', .* Did you"
    ):
        parse_distortion("turbulenz:1,2")
    with pytest.raises(UsageError, match="unknown distortion"):
        parse_distortion("")


@pytest.mark.parametrize("spec", ["turbulence:13,1", "blur:13"])
def test_a_gaussian_wider_than_the_image_is_refused(spec: str) -> None:
    distortion = parse_distortion(spec)
    distortion.check(28, 28)
    with pytest.raises(UsageError, match=r"\[0, 12\] pixels for images of 9 x 12, got 13"):
        distortion.check(9, 12)
    with pytest.raises(UsageError, match=r"\[0, 12\] pixels"):
        apply(spec, some_images())
    parse_distortion("mirror").check(1, 1)


def test_distortions_refuse_other_shapes() -> None:
    with pytest.raises(UsageError, match="expected float images"):
        apply("mirror", some_images().to(torch.uint8))
    with pytest.raises(UsageError, match=r"expected rows \(4,\)"):
        parse_distortion("mirror")(some_images(), torch.arange(3))
