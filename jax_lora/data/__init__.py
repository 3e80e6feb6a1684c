"""Instruction tasks: reading them, drawing task sets, prompts, batches, and a toy checkout."""
