"""What is kept of the benefit below two passes, against measured cost: the study `gradreg frontier`."""
