"""Microbenchmarks: every operation against what people write and the best they could write."""
