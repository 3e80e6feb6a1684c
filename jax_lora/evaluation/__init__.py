"""Scoring: the official metrics, how often a model leaves the options, and whole evaluations."""
