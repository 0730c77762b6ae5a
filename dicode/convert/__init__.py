"""Weights of other projects in our format."""
