"""Training benchmark: the same model, data and seeds under SGD, SAM and K-SAM."""
