"""Caltech-256 for tensorflow-datasets."""
