"""Trains autoencoders and exports them as model folders. Imports `codec` and `eval`."""
