"""Caches of latents on disk, for diffusion training: `codec-train cache`. Start at `build.write_cache`."""
