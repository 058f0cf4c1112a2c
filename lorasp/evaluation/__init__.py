"""Scores of a model that is still sharded: every rank runs the same number of forwards."""
