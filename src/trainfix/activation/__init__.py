"""Activation without a line in the script: ``trainfix run`` and ``trainfix enable``.

Both lead every interpreter that starts to ``bootstrap/_trainfix_waiting.py``, which imports trainfix when the first of
the packages that it repairs is imported, and costs an interpreter that imports none of them a fraction of `import
trainfix`:

- ``trainfix run`` puts the folder ``bootstrap`` first on PYTHONPATH; Python runs the ``sitecustomize.py`` in it.
- ``trainfix enable`` writes a ``.pth`` file into the environment's site-packages; Python runs the line in it.
"""

from __future__ import annotations

import os

INSIDE = os.path.join("trainfix", "activation", "bootstrap")
"""Where the bootstrap folder lies in a folder that holds the package trainfix."""

BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap")
"""The bootstrap folder of this trainfix."""
