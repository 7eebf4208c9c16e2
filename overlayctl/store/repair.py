"""``check --repair``: what follows from something is made again, what nobody needs goes.

Nothing is rewritten in place, and nothing that a person made is touched: uppers, volumes,
files that are not ours. What cannot be repaired is named, with the reason.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from overlayctl import names
from overlayctl.errors import Damaged, Holder, HostCannot, InUse, OverlayctlError
from overlayctl.kernel import mounttable
from overlayctl.layer import attach, erofs, index
from overlayctl.layout import generation
from overlayctl.store import (
    check,
    containers,
    derive,
    gc,
    images,
    layers,
    records,
    staging,
    volumes,
)
from overlayctl.store.finding import Finding
from overlayctl.store.records import fault

if TYPE_CHECKING:
    from overlayctl.layout import Layout
    from overlayctl.store.opened import Store

_REBUILT = ("layer-damaged", "layer-misnamed", "layer-not-derived")
_AGAIN = (
    "load an image that has the layer, which makes it again; "
    "containers keep what was written in them"
)
_FINISH = ("", "")
_FINISHED = (
    "staging-left", "snapshot-unfinished", "container-unfinished", "name-dangling",
    "volume-unfinished",
)  # fmt: skip
_ADVICE = {
    "layer-missing": "load the images that use it again",
    "image-damaged": "load it again",
    "config-damaged": "load the image again",
    "manifest-missing": "remove the image (overlayctl rmi) and load it again",
    "volume-damaged": "overlayctl volume rm removes the volume; what is in it stays until then",
    "tag-dangling": "load or tag an image of that name",
}
# A disk that is full, read-only or failing, or what a hand did to one file, hinders one
# repair and not the others.
_HINDRANCES = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EPERM, errno.EACCES,
    errno.EBUSY, errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY,
}  # fmt: skip


class Repaired(NamedTuple):
    """A finding that is one no longer; ``action`` is removed, made again or detached."""

    action: str
    finding: Finding


def repair(store: Store, *, deep: bool = False) -> tuple[list[Repaired], list[Finding]]:
    """Repair what can be; what was done, and what remains, as ``check`` would find it.

    The store's lock is held throughout. ``deep`` derives every index again; where that
    cannot be done it is one of the things that remain. Raises Locked.
    """
    with store.locked():
        return _Repair(store.layout, store.mark, deep=deep).run()


class _Repair:
    """One repair. ``reasons`` say why what remains could not be repaired."""

    def __init__(self, layout: Layout, mark: str, *, deep: bool) -> None:
        self._layout = layout
        self._mark = mark
        self._renewed: list[str] = []
        self._deep = deep
        self._reasons: dict[tuple[str, str], str] = {}
        self._seen: dict[tuple[str, str], Finding] = {}

    def run(self) -> tuple[list[Repaired], list[Finding]]:
        """Do all of it, in the order in which one step lets the next succeed."""
        for one in self._look():
            if one.tag == "directory-missing":
                self._try((one.tag, one.path), partial(self._directory, one.path))
        self._try(_FINISH, partial(gc.finish, self._layout))
        # First what frees space. A record that is made again may be what kept orphans unknown.
        self._orphans()
        self._records()
        self._orphans()
        remaining = self._layers()
        self._empty_image()
        self._stale()
        remaining += outdated_views(self._layout, self._mark, self._renewed)
        remaining += check.but_layers(self._layout)
        left = {(one.tag, one.path) for one in remaining}
        done = [one for what, one in self._seen.items() if what not in left]
        return [Repaired(self._action(one), one) for one in done], [
            self._explained(one) for one in remaining
        ]

    def _directory(self, path: str) -> None:
        """Not that of the uppers: with an empty one, every container would count as removed."""
        if path == self._layout.path("snapshots") and containers.recorded(self._layout):
            raise OverlayctlError("what was written in the containers lay there: put it back")
        os.mkdir(path, 0o700)

    def _look(self) -> list[Finding]:
        """What is wrong beside the content of layers."""
        return self._noted(check.but_layers(self._layout))

    def _noted(self, found: list[Finding]) -> list[Finding]:
        self._seen |= {(one.tag, one.path): one for one in found}
        return found

    def _action(self, finding: Finding) -> str:
        if finding.tag == "attach-stale":
            return "detached"
        place = os.path.dirname(finding.path) if finding.tag in _REBUILT else finding.path
        return "made again" if os.path.lexists(place) else "removed"

    def _explained(self, finding: Finding) -> Finding:
        reason = self._reasons.get((finding.tag, finding.path)) or _ADVICE.get(finding.tag)
        if not reason and finding.tag in _FINISHED:
            reason = self._reasons.get(_FINISH)
        if not reason:
            return finding
        return finding._replace(message=f"{finding.message}: not repaired: {reason}")

    def _try(self, what: tuple[str, str], action: Callable[[], object]) -> bool:
        """Whether ``action`` succeeds; what hinders it is the reason why ``what`` remains."""
        try:
            action()
        except OverlayctlError as error:
            self._reasons[what] = str(error)
        except OSError as error:
            if error.errno not in _HINDRANCES:
                raise
            self._reasons[what] = error.strerror or str(error)
        else:
            return True
        return False

    # -- what nobody needs -----------------------------------------------------------

    def _orphans(self) -> None:
        for one in self._look():
            if one.tag != "layer-orphan":
                continue
            name = os.path.basename(one.path)
            foreign = [n for n in records.names(one.path) if not _is_ours(n)]
            if foreign or not layers.is_name(name):
                what = f"it holds {foreign[0]}, which is" if foreign else "it is"
                self._reasons[one.tag, one.path] = f"{what} not of overlayctl"
                continue
            self._try((one.tag, one.path), partial(layers.remove, self._layout, name))

    def _stale(self) -> None:
        for stale in list(check.stale(self._layout)):
            if stale.pid == os.getpid():
                target = self._layout.diff(stale.layer)
                self._try(
                    ("attach-stale", target), partial(attach.detach, self._layout, stale.layer)
                )

    # -- layers ----------------------------------------------------------------------

    def _layers(self) -> list[Finding]:
        """What remains wrong with the content of layers."""
        users = gc.layer_users(self._layout)
        stored = records.names(self._layout.path("layers"))
        remaining: list[Finding] = []
        # A layer with facts asks those below, which lists of layers have first.
        order = dict.fromkeys(name for stack in derive.stacks(self._layout) for name in stack)
        ranks = {name: rank for rank, name in enumerate(order)}
        for name in sorted(stored, key=lambda name: ("-" in name, ranks.get(name, len(ranks)))):
            look = partial(check.layer, self._layout, name, tuple(users.get(name, ())), quick=False)
            try:
                wrong = look(deep=self._deep)
            except HostCannot as error:
                # A full disk must not keep the rest from being repaired.
                self._deep = False
                remaining.append(Finding("deep-impossible", self._layout.ingest, str(error)))
                wrong = look()
            self._noted(wrong)
            damaged = [one for one in wrong if one.tag in _REBUILT]
            if damaged and layers.is_name(name) and self._rebuilt(name, damaged[0]):
                wrong = [one for one in wrong if one not in damaged]
            remaining += wrong
            for one in wrong:
                if one.tag == "tree-damaged" and self._try(
                    (one.tag, one.path), partial(self._unpack, name)
                ):
                    remaining.remove(one)
            if not wrong:
                for path in check.superseded(self._layout, name):
                    self._try(("layer-superseded", path), partial(os.unlink, path))
        return remaining

    def _rebuilt(self, name: str, finding: Finding) -> bool:
        """Whether a layer was made again from its tar; if so its old files are unlinked next."""
        return self._try((finding.tag, finding.path), partial(self._rebuild, name))

    def _unpack(self, name: str) -> None:
        """A tree beside the damaged one: an overlay may have that, so it goes with its layer."""
        with staging.staging(self._layout) as place:
            staged = layers.unpack(self._layout, place, name)
            os.rename(staged, self._layout.layer_tree(name, after=1))
            records.sync_directory(self._layout.layer(name))
        self._renewed.append(name)

    def _rebuild(self, name: str) -> None:
        path = self._layout.layer_file(name)
        for source in (path, *check.superseded(self._layout, name)):
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = derive.tar_size(fd, name)
                if size is not None:
                    self._write(name, fd, size)
                    return
            finally:
                os.close(fd)
        raise OverlayctlError(f"its tar is not found whole in it: {_AGAIN}")

    def _write(self, name: str, source: int, size: int) -> None:
        with staging.staging(self._layout) as place:
            staged = os.path.join(place, "layer.erofs")
            fd = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
            try:
                derive.write(self._layout, name, source, size, fd)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            # The old file goes for this one: it has to be right as it lies there.
            wrong = index.verify(staged)
            if wrong:
                raise Damaged(f"what was written is not what is read: {', '.join(wrong)}")
            fault("repair:before-rename")
            os.rename(staged, self._layout.layer_file(name, after=1))
            records.sync_directory(self._layout.layer(name))
            fault("repair:after-rename")
        self._renewed.append(name)

    def _empty_image(self) -> None:
        for one in self._look():
            if one.tag.startswith("empty-image"):
                self._try((one.tag, one.path), self._write_empty)

    def _write_empty(self) -> None:
        """Only where no mount shows the old one: nothing would tell the two apart."""
        target = self._layout.diff(attach.EMPTY)
        attach.detach(self._layout, attach.EMPTY)
        holders = [
            Holder("mount", f"{target} in the mount namespace of process {pid}", "")
            for pid, mount in mounttable.everywhere()
            if mount.mount_point == target
        ]
        if holders:
            raise InUse(self._layout.empty, holders)
        with staging.staging(self._layout) as place:
            staged = os.path.join(place, "empty.erofs")
            erofs.write_empty(staged)
            records.sync_file(staged)
            os.rename(staged, self._layout.empty)
            records.sync_directory(self._layout.root)

    # -- records ---------------------------------------------------------------------

    def _records(self) -> None:
        for container_id in containers.listed(self._layout):
            try:
                container = containers.get(self._layout, container_id)
                names.container_name(container.name)
            except OverlayctlError:
                continue
            if containers.named(self._layout, container.name) != container.id:
                link = self._layout.container_name(container.name)
                self._try(
                    ("container-nameless", link),
                    partial(self._name, container),
                )
            path = self._layout.snapshot(container.id, "snapshot.json")
            if not os.path.lexists(path):
                self._try(
                    ("snapshot-damaged", self._layout.snapshot(container.id)),
                    partial(self._record_snapshot, container),
                )

        for name in volumes.listed(self._layout):
            path = self._layout.volume(name, "volume.json")
            if not os.path.lexists(path):
                self._try(("volume-damaged", path), partial(self._record_volume, name))

    def _record_volume(self, name: str) -> None:
        """From its copy; that a volume is there it says even where it cannot be read."""
        with staging.staging(self._layout) as place:
            staged = os.path.join(place, "volume.json")
            records.write(staged, volumes.again(self._layout, name))
            os.rename(staged, self._layout.volume(name, "volume.json"))
            records.sync_directory(self._layout.volume(name))

    def _name(self, container: containers.Container) -> None:
        # Its own may be another's by now.
        taken = os.path.lexists(self._layout.container_name(container.name))
        name = names.short(container.id) if taken else container.name
        os.symlink(container.id, self._layout.container_name(name))
        records.sync_directory(self._layout.path("containers", "names"))

    def _record_snapshot(self, container: containers.Container) -> None:
        """A container's snapshot lies on the layers of its image."""
        stack = images.get(self._layout, container.image).layers
        record = {"key": container.id, "owner": "container", "layers": list(stack)}
        with staging.staging(self._layout) as place:
            staged = os.path.join(place, "snapshot.json")
            records.write(staged, records.encode(record))
            os.rename(staged, self._layout.snapshot(container.id, "snapshot.json"))
            records.sync_directory(self._layout.snapshot(container.id))


def outdated_views(layout: Layout, mark: str, renewed: Collection[str]) -> list[Finding]:
    """Overlays mounted before one of these layers was made again: they keep the old one."""
    users = gc.layer_users(layout)
    harmed = {user: name for name in renewed for user in users.get(name, ())}
    found = []
    for pid, mount in mounttable.everywhere():
        ours, _, owner = mount.source.partition(f"overlayctl:{mark}:")
        kind, _, identifier = owner.partition(":")
        user = f"{'snapshot' if kind == 'container' else kind} {identifier}"
        if mount.fs_type == "overlay" and not ours and user in harmed:
            # Who asks sees it, too, but ends at once.
            seen = "you see" if pid == os.getpid() else f"process {pid} sees"
            message = (
                f"mounted before layer {names.short(harmed[user])} was made again, {seen} "
                "the damaged one there: unmount it, and mount it again"
            )
            found.append(Finding("view-stale", mount.mount_point, message, (user,)))
    return found


def _is_ours(name: str) -> bool:
    return bool(generation(name, "layer", ".erofs") or generation(name, "tree", ""))
