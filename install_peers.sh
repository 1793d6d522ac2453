#!/bin/sh
# Make the environment .venv-$1 of tests/peers/$1.txt: other projects that read what we write, or that we are measured
# beside, apart from our own.
set -eu
name=$1
python=${PYTHON:-python3}
"$python" -m venv ".venv-$name"
# torch, where it is wanted, first and by its exact version, so that no other requirement chooses another build of it
torch=$(grep '^torch==' "tests/peers/$name.txt" || true)
if [ -n "$torch" ]; then
    ".venv-$name/bin/python" -m pip install --quiet "$torch"
fi
".venv-$name/bin/python" -m pip install --quiet --requirement "tests/peers/$name.txt"
# packages of which only the files are wanted, without what they ask for
if [ -f "tests/peers/$name-alone.txt" ]; then
    ".venv-$name/bin/python" -m pip install --quiet --no-deps --requirement "tests/peers/$name-alone.txt"
fi
# what has to be put right in what was installed
if [ -f "tests/peers/${name}_after.py" ]; then
    ".venv-$name/bin/python" "tests/peers/${name}_after.py"
fi
