"""Smaller models made from a teacher, one file a family."""
