"""What OpenRLHF imports of flash-attn, in plain torch: its padding helpers. The real one needs a GPU.

For tests only: the folder above goes on the PYTHONPATH of the children that run OpenRLHF.
"""

__version__ = "2.8.3"
