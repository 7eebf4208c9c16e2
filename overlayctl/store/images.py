"""Images: a list of layers and a config, named by the config's digest, found by tags."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from overlayctl import names
from overlayctl.digest import DiffID, hex_of, of_bytes
from overlayctl.errors import Damaged, NotFound, OverlayctlError, Usage
from overlayctl.kernel import rooted
from overlayctl.store import records
from overlayctl.store.records import Record, fault

if TYPE_CHECKING:
    from overlayctl.layout import Layout


class Image(NamedTuple):
    """A stored image. ``layers`` (names in the store) and ``diff_ids`` run bottom to top."""

    hex: str
    layers: tuple[str, ...]
    diff_ids: tuple[DiffID, ...]
    created: str
    record: Record

    @property
    def id(self) -> str:
        """The image id: ``sha256:`` and the config's digest."""
        return f"sha256:{self.hex}"


def commit(
    layout: Layout, staging: str, record: Record, image_hex: str, config: bytes, manifest: bytes
) -> bool:
    """Write an image in staging and move it in; False if it was there.

    The caller holds the store's lock. One that is there stays as it is, unless it is
    damaged: then it is replaced.
    """
    target = layout.image(image_hex)
    if _is_whole(layout, image_hex):
        return False
    records.remove(layout.image(image_hex, "image.json"))
    rooted.remove_tree(target, ignore_errors=True)
    staged = os.path.join(staging, f"image-{image_hex}")
    os.mkdir(staged, 0o700)
    records.write(os.path.join(staged, "config.json"), config)
    records.write(os.path.join(staged, "manifest.json"), manifest)
    records.write(os.path.join(staged, "image.json"), records.encode(record))
    records.sync_directory(staged)
    fault("image:before-rename")
    os.rename(staged, target)
    records.sync_directory(layout.path("images"))
    fault("image:after-rename")
    return True


def _is_whole(layout: Layout, image_hex: str) -> bool:
    try:
        get(layout, image_hex)
        with open(layout.image(image_hex, "config.json"), "rb") as file:
            return hex_of(of_bytes(file.read())) == image_hex
    except (NotFound, Damaged, FileNotFoundError):
        return False


def get(layout: Layout, image_hex: str) -> Image:
    """The image with that full id. Raises NotFound, Damaged."""
    record = records.read(layout.image(image_hex, "image.json"))
    try:
        layers = record["layers"]
        for layer in layers:
            int(layer["size"])
        return Image(
            image_hex,
            tuple(str(layer["name"]) for layer in layers),
            tuple(DiffID(str(layer["diff_id"])) for layer in layers),
            str(record["loaded"]),
            record,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"the record of image {names.short(image_hex)} is damaged: {error}",
            hint="overlayctl system check",
        ) from error


def listed(layout: Layout) -> list[str]:
    """The ids (hex) of all images whose record is there."""
    return [
        name
        for name in records.names(layout.path("images"))
        if os.path.exists(layout.image(name, "image.json"))
    ]


def readable(layout: Layout) -> list[Image]:
    """All images whose record can be read; ``check`` names the others."""
    found = []
    for image_hex in listed(layout):
        try:
            found.append(get(layout, image_hex))
        except OverlayctlError:
            continue
    return found


def config(layout: Layout, image: Image) -> dict[str, Any]:
    """The image's config. Raises Damaged."""
    try:
        with open(layout.image(image.hex, "config.json"), "rb") as file:
            value = records.decoded(file.read())
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise Damaged(
            f"the config of image {names.short(image.hex)} is damaged",
            hint="load the image again",
        ) from error
    return value if isinstance(value, dict) else {}


def tags(layout: Layout) -> dict[str, str]:
    """Each reference and the image id (hex) it stands for."""
    found = {}
    for name in records.names(layout.path("tags")):
        tag = read_tag(layout.path("tags", name))
        if tag is not None:
            found[tag[1]] = tag[0]
    return found


def read_tag(path: str) -> tuple[str, str] | None:
    """Image id (hex) and reference of a tag file; None if it is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, IsADirectoryError):
        return None
    if len(lines) < 2 or not names.is_id(lines[0]):
        return None
    return hex_of(lines[0]), lines[1]


def tag(layout: Layout, staging: str, reference: str, image_hex: str) -> str | None:
    """Let a reference stand for an image; the id (hex) it stood for before, if another."""
    before = tags(layout).get(reference)
    if before == image_hex:
        return None
    staged = os.path.join(staging, "tag")
    records.write(staged, f"sha256:{image_hex}\n{reference}\n".encode())
    fault("tag:before-rename")
    os.rename(staged, layout.path("tags", names.tag_file(reference)))
    records.sync_directory(layout.path("tags"))
    fault("tag:after-rename")
    return before


def untag(layout: Layout, reference: str) -> None:
    """Take a reference away."""
    records.remove(layout.path("tags", names.tag_file(reference)))
    fault("tag:after-unlink")


def resolve(layout: Layout, text: str) -> tuple[Image, str | None]:
    """The image of a reference or an id's start, and the reference if it was one.

    Raises NotFound with close names, Ambiguous.
    """
    known = tags(layout)
    try:
        reference = names.stored(text)
    except Usage:
        reference = ""
    if reference in known:
        return get(layout, known[reference]), reference
    if names.is_id(text):
        try:
            return get(layout, names.match(text, listed(layout))), None
        except NotFound:
            pass
    hint = names.near(text, (names.familiar(ref).removesuffix(":latest") for ref in known))
    from overlayctl.store import containers

    if containers.named(layout, text) is not None:
        hint = f"{text} is a container: overlayctl commit {text} makes an image of it"
    raise NotFound(
        f"there is no image {text!r}",
        hint=hint
        or "overlayctl images lists them; overlayctl load FILE brings one: none is pulled",
    )


def note_view(layout: Layout, image_hex: str) -> None:
    """Remember that a view lies over unpacked layers: deleting those would empty it.

    A view over layer files needs no note: the kernel holds the files.
    """
    note = _view_note(layout, image_hex)
    try:
        if not os.path.exists(note):
            records.write(note, b"")
            records.sync_directory(layout.image(image_hex))
    except OSError as error:
        # Where nothing can be written, nothing can be deleted.
        if error.errno != errno.EROFS:
            raise


def is_viewed(layout: Layout, image_hex: str) -> bool:
    """Whether such a view was mounted since the host started, and not taken down by us."""
    return os.path.exists(_view_note(layout, image_hex))


def forget_view(layout: Layout, image_hex: str) -> None:
    """No view of the image is left."""
    if is_viewed(layout, image_hex):
        records.remove(_view_note(layout, image_hex))


def _view_note(layout: Layout, image_hex: str) -> str:
    return layout.image(image_hex, f"view-{records.boot_id()}")


def exists(layout: Layout, text: str) -> bool:
    """Whether an image answers to that reference or id's start."""
    try:
        resolve(layout, text)
    except NotFound:
        return False
    return True


def remove(layout: Layout, image_hex: str) -> None:
    """Unmake an image whose tags are gone: its record first, then the rest."""
    records.remove(layout.image(image_hex, "image.json"))
    fault("image:after-unlink")
    for name in records.names(layout.image(image_hex)):
        os.unlink(layout.image(image_hex, name))
    os.rmdir(layout.image(image_hex))
    fault("image:after-removal")
