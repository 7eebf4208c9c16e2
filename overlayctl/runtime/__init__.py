"""Mounting what the store describes, and taking it down again."""
