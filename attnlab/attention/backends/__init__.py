"""Backends of `attend`, one file each."""
