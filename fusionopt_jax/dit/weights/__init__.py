"""Weights as people have them: the formats of files, and the layouts of models."""
