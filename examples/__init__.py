"""Runnable examples: `python -m examples.<name>`, from the root of the repository."""
