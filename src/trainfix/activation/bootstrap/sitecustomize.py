"""Runs when an interpreter below ``trainfix run`` starts: waits for what is repaired, then runs the next sitecustomize.

Nothing in here may break the start of an interpreter. The syntax is that of Python 3.6.
"""

import os
import sys

try:
    import _trainfix_waiting  # type: ignore[import-not-found]  # noqa: F401
except Exception as error:
    if sys.stderr is not None:
        words = " ".join(str(error).split())
        sys.stderr.write(f"trainfix: not active in this process: {type(error).__name__}: {words}\n")


def run_the_next() -> None:
    """Import the sitecustomize that Python would have found without this folder, in our place.

    What it raises goes up, to where Python treats it as it would have.
    """
    here = os.path.dirname(__file__)
    ours = sys.modules.pop(__name__)
    place = sys.path.index(here)
    del sys.path[place]
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = ours  # there is no other
    finally:
        sys.path.insert(place, here)  # for programs that hand sys.path on as the PYTHONPATH of others


if os.path.dirname(__file__) in sys.path:
    run_the_next()
