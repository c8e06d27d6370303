"""Parallelisms that the compiler cannot do by itself: one file each, called by layers or the step through one function."""
