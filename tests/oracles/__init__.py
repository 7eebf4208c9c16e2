"""Other people's programs, made into answers to compare with.

Nothing in here imports ``overlayctl``: what a layer or a merged view should be is told by GNU tar,
umoci, dockerd, skopeo and erofs-utils, so that a mistake in our reading of a format cannot agree
with itself.
"""
