"""What is asked of layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from overlayctl.store import gc, records

if TYPE_CHECKING:
    from overlayctl.store.check import Finding


from overlayctl.engine.opened import Opened, rows


class Layers(Opened):
    """Layers: what is in them, where they are seen."""

    def layers(self) -> list[dict[str, Any]]:
        """One row for each stored layer."""
        from overlayctl.inspect import layer

        with self._seeing_all():
            return layer.rows(self.layout)

    def layer_name(self, spec: str) -> str:
        """The layer of ``REF:N`` (1 is the bottom) or of an id's start."""
        from overlayctl.inspect import layer

        with self._seeing_all():
            return layer.named(self.layout, spec)

    def inspect_layer(self, spec: str) -> dict[str, Any]:
        """Everything about one layer, attached."""
        from overlayctl.inspect import layer

        def act() -> dict[str, Any]:
            name = layer.named(self.layout, spec)
            return layer.describe(self.layout, name, self.store.attach_or_why([name]))

        return self.store.attaching(act)

    def layer_path(self, spec: str) -> str:
        """The layer's diff path, attached. Raises HostCannot where it cannot be."""
        from overlayctl.inspect import layer

        def act() -> str:
            name = layer.named(self.layout, spec)
            self.store.attach([name])
            return self.layout.diff(name)

        return self.store.attaching(act)

    def layer_files(self, spec: str) -> Iterator[dict[str, Any]]:
        """Each entry of a layer, read from its index."""
        from overlayctl.inspect import layer

        return layer.files(self.layout, self.layer_name(spec))

    def layer_cat(self, spec: str, path: bytes) -> Iterator[bytes]:
        """The bytes of one file of a layer. Raises NotFound, BadInput for no file."""
        from overlayctl.inspect import layer

        return layer.cat(self.layout, self.layer_name(spec), path)

    def layer_verify(self, spec: str | None) -> list[dict[str, Any]]:
        """What is wrong with one layer, or with any; a fault counts as it does for ``check``."""
        from overlayctl.inspect import layer
        from overlayctl.store import check

        with self._seeing_all():
            wanted = (
                [layer.named(self.layout, spec)]
                if spec
                else records.names(self.layout.path("layers"))
            )
            users = gc.layer_users(self.layout)

        def look(name: str) -> list[Finding]:
            return check.layer(self.layout, name, tuple(users.get(name, ())), quick=False)

        faulty = [name for name in wanted if look(name)]
        if not faulty:
            return []
        with self._seeing_all():
            still = set(records.names(self.layout.path("layers")))
            return rows(finding for name in faulty if name in still for finding in look(name))

    def detach(self, spec: str | None) -> list[str]:
        """Take one diff path away, or all that this namespace has; their names."""
        from overlayctl.inspect import layer
        from overlayctl.layer import attach

        with self.store.locked():
            wanted = [layer.named(self.layout, spec)] if spec else attach.attached(self.layout)
            gone = [name for name in wanted if attach.detach(self.layout, name)]
            if spec is None:
                attach.leave(self.layout)
        return [name for name in gone if name != attach.EMPTY]
