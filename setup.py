"""Build entry point: everything static lives in pyproject.toml."""

from setuptools import setup

setup()
