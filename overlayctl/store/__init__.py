"""What is on disk under the root: plain files, locks, commit points."""
