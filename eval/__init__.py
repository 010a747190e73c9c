"""Measures codecs: metrics, baselines, rate-distortion runs, plots. Imports `codec`; never `train`."""
