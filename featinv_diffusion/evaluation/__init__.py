"""Reconstructions of a data set: how well features come back, beside nulls and ceilings."""
