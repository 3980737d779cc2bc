"""Repairs of OpenRLHF."""
