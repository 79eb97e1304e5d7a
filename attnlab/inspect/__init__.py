"""Attention maps of trained models and figures of attention, masks and training curves."""
