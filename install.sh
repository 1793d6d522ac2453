#!/bin/sh
# Make the virtual environment $1 with the pinned versions of constraints.txt.
#
# A torch >= 2.8 that the machine's Python already has (a GPU build, say) is kept: the environment then sees
# the machine's packages and torch is left out of what is installed.
set -eu
venv=$1
python=${PYTHON:-python3}
have_torch='import sys, torch; v = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]); sys.exit(v < (2, 8))'

if "$python" -c "$have_torch" 2>/dev/null; then
    echo "using the torch that $python has"
    "$python" -m venv --system-site-packages "$venv"
    grep -v '^torch==' constraints.txt > "$venv/constraints.txt"
    "$venv/bin/python" -c 'import torch; print("torch==" + torch.__version__)' >> "$venv/constraints.txt"
else
    "$python" -m venv "$venv"
    cp constraints.txt "$venv/constraints.txt"
    # First and by its exact version, so that no other requirement chooses another build of it.
    "$venv/bin/pip" install --quiet "$(grep '^torch==' constraints.txt)"
fi
"$venv/bin/pip" install --quiet --constraint "$venv/constraints.txt" --editable '.[torch,cpu,dev]'
