"""Tests of the code that talks to the kernel, against the kernel."""
