"""Tells three species of iris apart by the measurements of a flower."""

__version__ = "1.0.0"
