#!/bin/sh
# Make the virtual environment $1 with the pinned versions of constraints.txt.
#
# A torch >= 2.8 that $PYTHON (python3) already has, a GPU build say, is kept: the new environment then sees the
# packages of that Python, be it the system's, conda's or another environment's, and torch is not installed.
set -eu
venv=$1
python=${PYTHON:-python3}
new_enough='import sys, torch; sys.exit(tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 8))'

"$python" -m venv "$venv"
cp constraints.txt "$venv/constraints.txt"
if "$python" -c "$new_enough" 2>/dev/null; then
    "$python" -c 'import torch; print("keeping torch", torch.__version__, "of", torch.__file__)'
    site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$site/packages_of_the_machine.pth"
    sed -i '/^torch==/d' "$venv/constraints.txt"
    "$venv/bin/python" -c 'import torch; print("torch==" + torch.__version__)' >> "$venv/constraints.txt"
else
    # First and by its exact version, so that no other requirement chooses another build of it.
    "$venv/bin/python" -m pip install --quiet "$(grep '^torch==' constraints.txt)"
fi
"$venv/bin/python" -m pip install --quiet --constraint "$venv/constraints.txt" --editable '.[torch,cpu,openvino,report,gguf,gateway,dev]'
