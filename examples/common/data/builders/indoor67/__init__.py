"""MIT Indoor 67 for tensorflow-datasets."""
