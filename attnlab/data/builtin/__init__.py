"""Data sets that serve one experiment."""
