"""Repairs of DeepSpeed."""
