"""Every image that others made: what is found in it, or why it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from overlayctl.errors import BadInput
from overlayctl.formats import FoundImage, read_images
from overlayctl.layer.archive import Archive, open_archive
from tests.archives import content, diff_id
from tests.images_of_others import LOADABLE, REFUSED, TABLE

Images = Callable[[str], Path]


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    with TemporaryDirectory() as place, open_archive(str(path), lambda: place) as archive:
        yield archive


def images_in(path: Path) -> list[FoundImage]:
    with opened(path) as archive:
        return read_images(archive)


@pytest.mark.parametrize("name", LOADABLE)
def test_what_is_found(name: str, image: Images) -> None:
    expected = LOADABLE[name]
    found = images_in(image(name))
    assert tuple(len(i.layers) for i in found) == expected.layers
    assert tuple(r for i in found for r in i.references) == expected.references
    assert all((i.manifest is not None) is expected.manifests for i in found)
    assert {str(i.platform) for i in found} == {expected.platform}
    notes = [note for i in found for note in i.notes]
    assert len(notes) == len(expected.notes)
    assert all(map(str.__contains__, notes, expected.notes))
    for one in found:
        assert one.image_id == diff_id(one.config)
        assert tuple(layer.diff_id for layer in one.layers) == one.diff_ids


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, image: Images) -> None:
    expected = REFUSED[name]
    with pytest.raises(BadInput) as caught:
        images_in(image(name))
    assert caught.value.code == expected.code
    assert expected.words in str(caught.value)
    assert expected.hint in caught.value.hint


@pytest.mark.parametrize("name", LOADABLE)
def test_every_layer_is_the_promised_tar(name: str, image: Images) -> None:
    with opened(image(name)) as archive:
        for one in read_images(archive):
            for layer in one.layers:
                assert diff_id(content(layer.source, layer.blob_digest)) == layer.diff_id


def test_the_table_names_every_file(images: Path) -> None:
    """A file that came to the folder wants a line, and a line wants its file."""
    layouts = {path.parent for path in images.rglob("index.json")}
    files = {path for path in images.rglob("*") if path.is_file()}
    files = {path for path in files if layouts.isdisjoint(path.parents)}
    there = {str(path.relative_to(images)) for path in files | layouts}
    assert there - {"README.md"} == set(TABLE)
