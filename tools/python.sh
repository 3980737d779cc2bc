#!/bin/sh
# Runs its arguments with the first Python >= 3.10 that it finds: $PYTHON, else python3.11, else python3.
set -eu
needs='import sys; assert sys.version_info >= (3, 10); import venv, ensurepip'
for candidate in ${PYTHON:-python3.11 python3}; do
    if "$candidate" -c "$needs" >/dev/null 2>&1; then
        exec "$candidate" "$@"
    fi
done
echo "trainfix needs Python 3.10 or newer with its venv module. Tried: ${PYTHON:-python3.11 python3}." >&2
if command -v python3 >/dev/null 2>&1; then
    echo "python3 here is $(python3 --version 2>&1); on Debian the venv module is the package python3-venv." >&2
else
    echo "There is no python3 on the PATH." >&2
fi
echo "Install Python 3.11, or name an interpreter: make PYTHON=/path/to/python3.11" >&2
exit 1
