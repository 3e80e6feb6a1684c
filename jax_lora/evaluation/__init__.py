"""Scoring: the official metrics, how often answers are out of options, and evaluations."""
