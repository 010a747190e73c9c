"""The conditional head: a CVAE on a codec's latents."""
