"""Files on one side, pytrees on the other, and nothing else."""
