"""Published autoencoders become model folders: `codec-train import`. Start at `convert`."""
