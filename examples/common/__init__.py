"""Modules that are shared by the examples."""
