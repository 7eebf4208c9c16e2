"""Load the plugin that gives root tests their mount namespaces."""

pytest_plugins = ["tests.rootmount"]
