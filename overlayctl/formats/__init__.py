"""What other tools write: archives and layouts, read into one shape."""
