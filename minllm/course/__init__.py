"""The course: the same ideas again, from the ground up, for whoever wants to write them once by hand."""
