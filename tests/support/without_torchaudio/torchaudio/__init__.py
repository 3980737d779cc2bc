"""Stands in for torchaudio, which LLaMA-Factory imports and needs for sounds alone."""
