"""Servers of what was trained."""
