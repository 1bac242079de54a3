#!/usr/bin/env bash
# All benches of a CPU, or one with its flags, into bench/RESULTS.md: a quarter of an hour on two cores.
# Peers of PyPI go into an environment of their own, which sees this project's torch; karpathy's
# repositories take part where .peers/{nanoGPT,nanochat,llm.c} hold checkouts of them.
set -euo pipefail
cd "$(dirname "$0")/.."
export GOMP_SPINCOUNT=20000
python=.peers/venv/bin/python
if [ ! -e .peers/ready ] || [ bench/peers.txt -nt .peers/ready ]; then
    python3 -m venv .peers/venv
    ls -d "$PWD"/.venv/lib/python3*/site-packages > .peers/deepdive.pth
    cp .peers/deepdive.pth .peers/venv/lib/python3*/site-packages/
    $python -m pip install --quiet --disable-pip-version-check -r bench/peers.txt
    touch .peers/ready
fi
measure() { $python bench/measure.py "$*" $python "bench/$1.py" "${@:2}"; }
if [ $# -gt 0 ]; then
    measure "$@"            # bash bench/cpu.sh train --quality 3 --data data/wiki
else
    for name in train bpe prepare sample rl eval growth project; do measure $name; done
    measure prepare --growth 20
fi
