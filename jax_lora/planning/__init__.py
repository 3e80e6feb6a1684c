"""Counting before the launch."""
