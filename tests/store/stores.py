"""Stores for tests: real layers made of tars, through the same doors as the engine."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from overlayctl.digest import chain_ids, hex_of, of_bytes
from overlayctl.layer import attach
from overlayctl.layer.compression import Source
from overlayctl.layout import Layout
from overlayctl.store import containers, images, layers, locks, records, snapshots, staging
from overlayctl.store.containers import Config, Container
from overlayctl.store.ingest import Ingested, Wanted, ingest_layers

KEY = "ab" * 32
OTHER_KEY = "cd" * 32


class Silent:
    def start(self, total: int | None, layers: int) -> None: ...

    def advance(self, count: int) -> None: ...

    def layer_done(self, number: int) -> None: ...


def new(path: Path | str) -> Layout:
    return records.open_store(os.fspath(path), create=True)[0]


@contextmanager
def writing(layout: Layout) -> Iterator[str]:
    with locks.hold(layout.root, exclusive=True), staging.staging(layout) as place:
        yield place


def add_layers(layout: Layout, *tars: bytes) -> Ingested:
    with staging.staging(layout) as place:
        with tempfile.TemporaryFile(buffering=0) as file:
            wanted = []
            for data in tars:
                wanted.append(Wanted(None, Source(file.fileno(), file.tell(), len(data), "a tar")))
                file.write(data)
            ingested = ingest_layers(layout, place, wanted, Silent())
        with locks.hold(layout.root, exclusive=True):
            for name, staged in ingested.staged.items():
                layers.commit(layout, staged, name)
            records.sync_directory(layout.path("layers"))
    return ingested


def add_image(layout: Layout, *tars: bytes, tag: str | None = None) -> images.Image:
    ingested = add_layers(layout, *tars)
    diff_ids = list(ingested.diff_ids)
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
    image_hex = hex_of(of_bytes(config))
    record = {
        "id": f"sha256:{image_hex}",
        "loaded": records.now(),
        "layers": [
            {"name": name, "diff_id": diff_id, "chain_id": chain, "size": size}
            for name, diff_id, chain, size in zip(
                ingested.names, diff_ids, chain_ids(diff_ids), ingested.sizes, strict=True
            )
        ],
    }
    with writing(layout) as place:
        images.commit(layout, place, record, image_hex, config, b"{}")
        if tag:
            images.tag(layout, place, tag, image_hex)
    return images.get(layout, image_hex)


def add_snapshot(layout: Layout, names: Sequence[str], key: str = KEY) -> None:
    with writing(layout) as place:
        snapshots.prepare(layout, place, key, "container", names)


def add_container(
    layout: Layout, image: images.Image, name: str = "web", key: str = KEY
) -> Container:
    container = Container(key, name, image.hex, image.id, Config(), {}, records.now())
    with writing(layout) as place:
        snapshots.prepare(layout, place, key, "container", image.layers)
        containers.commit(layout, place, container)
    return container


@contextmanager
def attached(layout: Layout, names: Sequence[str]) -> Iterator[None]:
    """The layers are there inside the block; nothing of it is left mounted."""
    from overlayctl.kernel import mounter

    attach.attach(layout, "test", names, "auto")
    try:
        yield
    finally:
        for name in attach.attached(layout):
            attach.detach(layout, name)
        mounter.unmount(layout.attached)
