"""The loss room by the compiled extension."""
