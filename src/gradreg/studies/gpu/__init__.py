"""What there is to measure on the day a GPU is there: named pieces, each of minutes, and a page of what there is."""
