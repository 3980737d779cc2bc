"""The compiled host loop of trainfix. Nothing to call here: trainfix finds `_loop` by itself."""
