"""Which autoencoder does a diffusion model learn best from: `codec-train race`. Start at `run`."""
