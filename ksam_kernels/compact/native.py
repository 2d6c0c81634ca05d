"""The compact room by the compiled extension."""
