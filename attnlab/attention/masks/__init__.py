"""Masks: which pairs of positions may attend."""
