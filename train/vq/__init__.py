"""The regulariser of VQModel: codebooks and lattices, their losses, statistics, usage and export."""
