#!/usr/bin/env bash
# All benches of a CPU, or those that are named, into bench/RESULTS.md: a quarter of an hour on two cores.
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
[ $# -gt 0 ] || set -- train bpe prepare sample rl eval growth
for name in "$@"; do
    $python bench/measure.py "$name" $python "bench/$name.py"
done
