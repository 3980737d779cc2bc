"""The run-time monitor: what each backward contributed, against what the optimizer is about to consume.

Knows nothing of advisories. Imports torch.
"""
