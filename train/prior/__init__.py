"""A prior over codebook indices: the second stage of a VQ model. Start at `task.PriorTask` and `sampling.draw`."""
