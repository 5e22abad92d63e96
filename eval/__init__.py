"""Scores and speed: what a run is worth, beside its baseline. `python -m eval.fid`, `python -m eval.throughput`."""
