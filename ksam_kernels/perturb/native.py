"""The perturb room by the compiled extension."""
