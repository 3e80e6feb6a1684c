"""Parameters, memory, operations and days of a run, before its launch."""
