"""Mixtures of image data sets: each task is all of one domain, and a domain's images are what it says they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules import DataError, Domain, EpisodicDataModule, ImageMixture
from datamodules.core.streams import TaskStreams
from datamodules.images.tasks import ImageClasses
from tests.support.image_tasks import chi_square_is_plausible, same
from tests.support.toy import ToyImages


class Plain(ToyImages):
    """Twelve classes of 6 images without any symmetry in each split, which the seed deals out."""

    size, first = 5, 0

    def classes(self, split: str) -> ImageClasses:
        order = np.random.default_rng(self.seed).permutation(36) + self.first
        k = order[12 * ("train", "val", "test").index(split) :][:12]
        images = np.stack(
            [np.random.default_rng([c, i]).integers(0, 256, (1, self.size, self.size)) for c in k for i in range(6)]
        )
        names = [f"class{c}" for c in k]
        return ImageClasses(torch.from_numpy(images.astype(np.uint8)), np.full(12, 6), names, names)


class Turning(Plain):
    """Others, whose turns are classes of their own."""

    first = 100
    rotations = dict.fromkeys(("train", "val", "test"), "classes")


class Larger(Plain):
    size = 6


def mixture(**settings) -> ImageMixture:
    domains = {
        "plain": Domain(Plain()),
        "turned": Domain(Plain(), rotate=90),
        "inverted": Domain(Plain(), invert=True),
        "other": Domain(Turning(), rotate=180, invert=True),
    }
    return ImageMixture(domains, **{"ways": 3, "shots": 2, "queries": 3, **settings})


def shown(name: str, image: np.ndarray, turns: int) -> np.ndarray:
    """One image (H, W) as its domain shows it, where a class is also turned by itself."""
    quarter = {"plain": 0, "turned": 1, "inverted": 0, "other": 2}[name] + turns
    result = image.copy()
    for _ in range(quarter):  # against the clock: the right column becomes the top row
        result = np.array([[result[row, -1 - column] for row in range(len(result))] for column in range(len(result))])
    return result if name in ("plain", "turned") else 255 - result


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_image_is_what_its_task_says(split):
    """Catches tasks of two domains, a turn in the other direction, an image in support and query, labels, names or row
    numbers of another domain, and an order of the tasks that is the domains'."""
    data = mixture()
    tasks = data.distribution(split)
    episodes = tasks.sample(range(50, 90))
    assert episodes.index.tolist() == list(range(50, 90))
    assert len(set(episodes.task["domain"].tolist())) == 4
    rows: dict[int, bytes] = {}
    for t in range(40):
        name = list(data.domains)[episodes.task["domain"][t]]
        called = [tasks.class_names[k] for k in episodes.task["classes"][t].tolist()]
        assert [tasks.group_names[k] for k in episodes.task["classes"][t].tolist()] == [name] * 3
        seen = set()
        for x, y, row in (
            (episodes.support_x[t], episodes.support_y[t], episodes.support_rows[t]),
            (episodes.query_x[t], episodes.query_y[t], episodes.query_rows[t]),
        ):
            for image, label, number in zip(x[:, 0].numpy(), y.tolist(), row.tolist(), strict=True):
                domain, _, of = called[label].partition(": ")
                base, _, degrees = of.partition("@")
                assert domain == name
                k = int(base.removeprefix("class"))
                instances = [np.random.default_rng([k, i]).integers(0, 256, (1, 5, 5))[0] for i in range(6)]
                found = [i for i in range(6) if (shown(name, instances[i], int(degrees or 0) // 90) == image).all()]
                assert len(found) == 1
                seen.add((k, degrees, found[0]))
                assert rows.setdefault(number, image.tobytes()) == image.tobytes()
        assert len(seen) == 15
    assert len(set(rows.values())) == len(rows)
    assert len(set(episodes.fingerprint().tolist())) == 40


def test_domains_and_classes_are_drawn_alike_and_independently():
    """Catches a domain that prevails, and classes that depend on the number that chose the domain."""
    tasks = mixture().distribution("train")
    episodes = tasks.sample(range(12_000))
    domain = episodes.task["domain"].numpy()
    assert chi_square_is_plausible(domain, 4)
    first = episodes.task["classes"][:, 0].numpy()
    for number, classes in enumerate((12, 12, 12, 48)):
        assert chi_square_is_plausible(first[domain == number] - 12 * number, classes)


def test_a_task_does_not_depend_on_its_batch():
    """Catches streams that go on from another task's, and seeds or splits that share tasks."""
    tasks = mixture().distribution("train")
    alone = tasks.sample([7])
    for indices in ([7, 8], [400, 7, 3], list(range(20))):
        assert same(tasks.sample(indices), indices.index(7), alone, 0)
    assert same(mixture().distribution("train").sample([7]), 0, alone, 0)
    assert not same(mixture(seed=1).distribution("train").sample([7]), 0, alone, 0)
    reseeded = mixture().distribution("train")
    reseeded.seed = 5
    differ = [not same(reseeded.sample([i]), 0, tasks.sample([i]), 0) for i in range(8)]
    assert all(differ)


def test_streams_of_some_tasks_go_on_where_all_were():
    """Catches a part of the streams that starts again, or that is another task's."""
    all_tasks = TaskStreams(3, "val", [4, 9, 2])
    all_tasks.uniform(0, 1, 5)
    some = all_tasks.of(np.array([2, 0]))
    assert np.array_equal(some.bits(7), all_tasks.bits(7)[[2, 0]])


def test_versions_of_a_source_split_their_classes_alike():
    """Catches a class that is trained on in one version and tested in another: seeds of their own."""
    data = mixture(seed=8)
    of_split = {}
    for split in ("train", "val", "test"):
        tasks = data.distribution(split)
        of_split[split] = {name.split(": ")[1].split("@")[0] for name in tasks.class_names}
        by_domain = {d: {n.split("@")[0] for n in part.class_names} for d, part in tasks.domains.items()}
        assert by_domain["plain"] == by_domain["turned"] == by_domain["inverted"]
    assert not of_split["train"] & of_split["test"]
    assert not of_split["train"] & of_split["val"]
    assert not of_split["val"] & of_split["test"]


def test_settings_of_the_mixture_reach_its_domains():
    """Catches a source that keeps its own ways, and a root that is not passed on or taken from who has one."""
    own = Domain(Plain(root="elsewhere", ways=9, shots=1))
    data = ImageMixture({"a": own, "b": Domain(Plain())}, ways=4, shots=1, queries=2, train_ways=5, root="here")
    assert data.distribution("train").sample([0]).ways == 5
    episodes = data.distribution("test").sample([0])
    assert (episodes.ways, episodes.support_x.shape[1], episodes.query_x.shape[1]) == (4, 4, 8)
    assert [d.source.root for d in data.domains.values()] == ["elsewhere", "here"]


def test_unlabelled_images_are_of_the_tasks_own_domain():
    """Catches unlabelled images that are lost in the mixture, go to another task, or change what is labelled."""
    indices = list(range(40))
    got, plain = (mixture(queries=2, unlabelled=n).distribution("train").sample(indices) for n in (2, 0))
    assert torch.equal(got.support_x, plain.support_x) and torch.equal(got.query_rows, plain.query_rows)
    assert got.unlabelled_x is not None and got.unlabelled_x.shape == (40, 6, 1, 5, 5)
    everything = torch.cat([tasks.images for tasks in mixture().distribution("train").domains.values()])
    for i in range(40):
        # Six images of each class: two shots, two queries and two unlabelled ones are all that there are.
        classes = (got.support_rows[i] // 6).unique().tolist()
        expected = torch.cat([everything[6 * k : 6 * k + 6] for k in classes])
        seen = torch.cat([got.support_x[i], got.query_x[i], got.unlabelled_x[i]])
        assert sorted(seen.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())


def test_a_picture_is_stored_as_the_first_domain_shows_its_own():
    """Catches a user's picture in another polarity or turn than what was trained on."""
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    data = ImageMixture({"a": Domain(ToyImages(), rotate=90, invert=True)})
    expected = 255 - np.rot90(np.asarray(picture))
    assert np.array_equal(data.to_store(picture)[0].numpy(), expected)


def test_mixtures_that_cannot_be_are_refused():
    """Catches images of two shapes that fail within a run, no domain at all, and a source with another pipeline."""

    class Own(Plain):
        def normalize(self, images):
            return images

    with pytest.raises(DataError, match=r"a 1×5×5, b 1×6×6"):
        ImageMixture({"a": Domain(Plain()), "b": Domain(Larger())}, ways=2, queries=2).distribution("val")
    with pytest.raises(ValueError, match="one or more"):
        ImageMixture({})
    with pytest.raises(ValueError, match=r"'b': Own cannot"):
        ImageMixture({"a": Domain(Plain()), "b": Domain(Own())})


def test_a_configuration_describes_domains():
    """Catches a YAML that cannot name sources with settings of their own, or a turn by any angle."""
    parser = ArgumentParser()
    parser.add_argument("--data", type=EpisodicDataModule)
    source = {"class_path": "datamodules.Omniglot", "init_args": {"protocol": "vinyals"}}
    given = {"a": {"source": source, "rotate": 270}, "b": {"source": "datamodules.Glyphs", "invert": True}}
    settings = {"class_path": "datamodules.ImageMixture", "init_args": {"domains": given, "root": "x", "seed": 3}}
    data = parser.instantiate(parser.parse_object({"data": settings})).data
    a, b = data.domains.values()
    assert (a.source.protocol, a.source.seed, a.source.root, a.rotate, a.invert) == ("vinyals", 3, "x", 270, False)
    assert (type(b.source).__name__, b.rotate, b.invert) == ("Glyphs", 0, True)
    given["a"]["rotate"] = 45
    parser.exit_on_error = False
    with pytest.raises(Exception, match="45"):
        parser.parse_object({"data": settings})
