"""Turning a model and prompts into new tokens."""
