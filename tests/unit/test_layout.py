"""Which of a layer's files counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from overlayctl.layout import Layout, generation


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("layer.erofs", 1),
        ("layer-2.erofs", 2),
        ("layer-10.erofs", 10),
        ("layer-1.erofs", 0),
        ("layer-02.erofs", 0),
        ("layer-x.erofs", 0),
        ("layer-.erofs", 0),
        ("layer-3.erofs.old", 0),
        ("tree", 0),
    ],
)
def test_generation(name: str, number: int) -> None:
    assert generation(name, "layer", ".erofs") == number


def test_the_highest_number_counts(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    assert layout.layer_file("a").endswith("/layers/a/layer.erofs")
    place = tmp_path / "layers" / "a"
    place.mkdir(parents=True)
    assert layout.layer_file("a", after=1).endswith("/layer.erofs")
    for name in ("layer.erofs", "layer-2.erofs", "layer-10.erofs", "notes", "tree", "tree-2"):
        (place / name).touch()
    assert layout.layer_file("a") == str(place / "layer-10.erofs")
    assert layout.layer_file("a", after=1) == str(place / "layer-11.erofs")
    assert layout.layer_tree("a") == str(place / "tree-2")
