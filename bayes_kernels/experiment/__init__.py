"""Whole runs of the command line: data, recipe, training, scores, comparisons and their folders."""
