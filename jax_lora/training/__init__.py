"""What trains, one step of it, the loop around the step, and its checkpoints."""
