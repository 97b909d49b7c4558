"""Wheels where they must run."""
