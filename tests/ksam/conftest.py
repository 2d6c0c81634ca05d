"""All tests of the optimizer train small models."""

from tests.helpers import one_thread as one_thread
