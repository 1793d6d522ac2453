#!/bin/sh
# Make the virtual environment $1 with the pinned versions of constraints.txt, for $2: "demo" (what the demo runs) or
# "all" (what the tests run, too: llama.cpp, OpenVINO, TensorRT-RTX, the gateway, the tools of a developer).
#
# A torch >= 2.8 that $PYTHON (python3) already has, a GPU build say, is kept: the new environment then sees the
# packages of that Python, be it the system's, conda's or another environment's, and torch is not installed.
set -eu
venv=$1
for=$2
python=${PYTHON:-python3}
new_enough='import sys, torch; sys.exit(tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 8))'
begun=$(date +%s)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off

say() {
    echo "[$(($(date +%s) - begun)) s] $1"
}

# Quiet but for errors: what pip said is shown whole where it fails, and kept in the environment. Python compiles a
# module where it is first imported; pip would compile every one beforehand, for most of a minute.
install() {
    log="$venv/pip.log"
    if ! "$venv/bin/python" -m pip install --no-compile "$@" > "$log" 2>&1; then
        cat "$log" >&2
        say "pip failed; what it said stands above. The same command goes on from here." >&2
        exit 1
    fi
}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$python is too old or not there: Python 3.10 or newer is needed. Name one: make demo PYTHON=python3.11" >&2
    exit 2
fi
if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    say "making the virtual environment $venv"
    "$python" -m venv "$venv"
fi
if [ ! -f "$venv/constraints.txt" ] || [ constraints.txt -nt "$venv/constraints.txt" ]; then
    cp constraints.txt "$venv/constraints.new"
    if "$python" -c "$new_enough" 2>/dev/null; then
        "$python" -c 'import torch; print("keeping torch", torch.__version__, "of", torch.__file__)'
        site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
        "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' > "$site/packages_of_the_machine.pth"
        sed -i '/^torch==/d' "$venv/constraints.new"
        "$venv/bin/python" -c 'import torch; print("torch==" + torch.__version__)' >> "$venv/constraints.new"
    else
        say "installing torch (some 200 MB on a CPU)"
        # First and by its exact version, so that no other requirement chooses another build of it.
        install "$(grep '^torch==' constraints.txt)"
    fi
    mv "$venv/constraints.new" "$venv/constraints.txt"
fi
case $for in
demo)
    say "installing what the demo runs: transformers, ONNX Runtime, the report"
    install --constraint "$venv/constraints.txt" --editable '.[torch,cpu,report]'
    ;;
all)
    # NVIDIA's builder for engines without a GPU (90 MB); its tests skip where there is no wheel of it.
    extras=torch,cpu,openvino,report,gguf,gateway,logs,dev
    case $(uname -s)-$(uname -m) in Linux-x86_64 | Linux-aarch64) extras=$extras,rtx ;; esac
    say "installing what the tests run, too; llama.cpp is compiled, which takes 5 to 20 minutes the first time"
    install --constraint "$venv/constraints.txt" --editable ".[$extras]"
    ;;
*)
    echo "install.sh VENV demo|all, not $for" >&2
    exit 2
    ;;
esac
say "installed"
