"""Domain-incremental streams."""

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from datamodules import DataError, TransformedStreams
from datamodules.continual.transformed_streams import rotated
from datamodules.images.tasks import ImageClasses
from tests.support.toy import ToyImages


class Numbered(ToyImages):
    """Six classes of 8 images, 2 × 2 pixels: class, 10 + number, 100 + split, 200, which tell themselves apart."""

    def classes(self, split: str) -> ImageClasses:
        where = {"train": 0, "val": 1, "test": 2}[split]
        pixels = torch.tensor([(k, 10 + i, 100 + where, 200) for k in range(6) for i in range(8)], dtype=torch.uint8)
        return ImageClasses(pixels.view(-1, 1, 2, 2), np.full(6, 8), [f"c{k}" for k in range(6)], ["g"] * 6)


def streams(split: str = "test", **settings):
    small = {"transform": "permutation", "experiences": 4, "shots": 12, "queries": 6, "classes": 4, "held_out": 0.3}
    return TransformedStreams(Numbered(), **small | settings).distribution(split)


def sorted_pixels(batch, name: str) -> np.ndarray:
    """Class, 10 + number, 100 + split and 200 of every image, in whatever order its pixels are, (T, J, n, 4)."""
    return np.sort(batch.inputs[getattr(batch, name)].flatten(-3).numpy().astype(int), -1)


def test_experiences_share_classes_and_never_teach_what_is_asked():
    """Catches labels that differ by experience, images that are asked about in one experience and taught in another."""
    batch = streams().sample(range(20))
    assert batch.classes == 4 and batch.y.shape == (20, 4, 12) and batch.query_y.shape == (20, 4, 6)
    x, q = sorted_pixels(batch, "rows"), sorted_pixels(batch, "query_rows")
    for t in range(20):
        learned, asked = ({tuple(image) for image in found[t].reshape(-1, 4)} for found in (x, q))
        assert not learned & asked and len(asked) <= 10 and len(learned) <= 22
        assert all(len({tuple(image) for image in of_one}) == len(of_one) for of_one in (*x[t], *q[t]))
        classes = sorted({image[0] for image in learned | asked})
        assert len(classes) == 4
        for found, y in ((x, batch.y), (q, batch.query_y)):
            assert (np.array(classes)[y[t].numpy()] == found[t, ..., 0]).all()
    assert {int(image[0]) for image in x.reshape(-1, 4)} == set(range(6))


@pytest.mark.parametrize("transform", ["rotation", "permutation"])
def test_an_experience_depends_on_seed_split_and_numbers_alone(transform):
    """Catches experiences that change with the length of the stream or with the other streams of the batch."""
    settings = {"transform": transform, "degrees": 180.0}
    long, short = streams(**settings), streams(**settings | {"experiences": 2, "degrees": 90.0})
    together, alone = long.sample([4, 7, 9]), short.sample([7])
    for name in ("rows", "query_rows"):
        assert torch.equal(together.inputs[getattr(together, name)][1, :2], alone.inputs[getattr(alone, name)][0])
    assert torch.equal(together.y[1, :2], alone.y[0]) and together.key[1] == alone.key[0]
    other = streams(**settings, seed=1).sample([7])
    assert other.key[0] != alone.key[0] and other.fingerprint()[0] != long.sample([7]).fingerprint()[0]
    assert long.sample([3, 7]).fingerprint()[1] == together.fingerprint()[1] != together.fingerprint()[0]


def test_splits_have_images_and_transforms_of_their_own():
    """Catches hyper-parameters that are chosen on the images, angles or permutations that they are tested on."""
    turned = {s: streams(s, transform="rotation").sample(range(3)).task["angles"] for s in ("train", "val", "test")}
    flat = torch.stack(list(turned.values())).flatten()
    assert len(flat.unique()) == len(flat)
    many = [
        TransformedStreams(ToyImages(), "permutation", shots=20, queries=5).distribution(s) for s in ("val", "test")
    ]
    assert not np.array_equal(*(d.permutation(3, 5) for d in many))
    for name, mark in (("val", 101), ("test", 102)):
        assert (sorted_pixels(streams(name).sample([0]), "rows")[..., 2] == mark).all()


def test_angles_are_spread_evenly_and_rise():
    """Catches angles that cluster, repeat, or miss a part of the range."""
    angles = streams(transform="rotation", degrees=80.0).sample(range(500)).task["angles"].numpy()
    assert ((angles >= 20 * np.arange(4)) & (angles < 20 * np.arange(1, 5))).all()
    assert np.abs((angles / 20 - np.arange(4)).mean(0) - 0.5).max() < 0.06


def test_permutations_are_all_as_likely():
    """Catches a first experience without one, and permutations that are shared by experiences or streams."""
    tasks = streams()
    seen = {tuple(tasks.permutation(j, i)) for i in range(100) for j in range(4)}
    assert len(seen) == 24


@pytest.mark.parametrize("angle", [0.0, 90.0, 33.0])
def test_rotation_is_about_the_middle(angle):
    """Catches a turn the other way, about a corner, or of what is not square sheared: against SciPy's interpolation."""
    image = (torch.rand(1, 1, 9, 6, generator=torch.Generator().manual_seed(0)) * 255).byte()
    a = np.deg2rad(angle)
    # Anticlockwise as seen, rows pointing down.
    matrix = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    middle = np.array([4.0, 2.5])
    padded = np.pad(image[0, 0].numpy().astype(float), 1)
    expected = affine_transform(
        padded, matrix, middle + 1 - matrix @ middle, output_shape=(9, 6), order=1, mode="grid-constant"
    )
    np.testing.assert_allclose(rotated(image, angle)[0, 0].numpy(), expected, atol=0.6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": 7}, "has 6 classes but a stream needs 7: lower classes to 6"),
        ({"shots": 23}, "have 22 images to learn from but an experience needs 23: lower shots to 22"),
        ({"queries": 11}, "have 10 images to ask about but an experience needs 11: lower queries to 10"),
    ],
)
def test_streams_that_need_more_than_there_is(settings, words):
    """Catches a traceback, or images that are met twice, in the place of one line that names the setting."""
    with pytest.raises(DataError) as told:
        streams(**settings)
    assert words in str(told.value)
