"""Container images as content-addressed layers, mounted with the kernel's own OverlayFS."""

__version__ = "0.1.0"
