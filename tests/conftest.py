"""Load the plugin that gives root tests their mount namespaces, and keep every layer they write."""

from __future__ import annotations

import pytest

pytest_plugins = ["tests.rootmount", "tests.both_ways", "tests.kept"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave for the end what looks at the layers of all other tests."""
    items.sort(key=lambda item: item.path.name == "test_both_ways.py")
