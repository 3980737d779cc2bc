"""Repairs of LLaMA-Factory."""
