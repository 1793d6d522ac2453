#!/bin/sh
# Make the environment .venv-$1 of tests/peers/$1.txt: other projects that read what we write, apart from our own.
set -eu
name=$1
python=${PYTHON:-python3}
"$python" -m venv ".venv-$name"
# torch first and by its exact version, so that no other requirement chooses another build of it
".venv-$name/bin/python" -m pip install --quiet "$(grep '^torch==' "tests/peers/$name.txt")"
".venv-$name/bin/python" -m pip install --quiet --requirement "tests/peers/$name.txt"
