"""Repairs of torchao, and guards against what it does not support."""
