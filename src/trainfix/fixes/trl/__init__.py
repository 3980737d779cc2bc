"""Repairs of TRL."""
