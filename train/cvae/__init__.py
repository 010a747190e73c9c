"""Autoencoders that know the class of their images: classes out of shards, what a class is worth, export."""
