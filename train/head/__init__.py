"""Training of the conditional head."""
