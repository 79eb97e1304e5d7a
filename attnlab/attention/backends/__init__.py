"""Backends of `attend`, one module each."""
