#!/usr/bin/env bash
# Builds, checks and times everything on one GPU (CUDA 13, torch 2.11 or later, no network), in calls
# of nine minutes: a second call goes on with the parts that are not done. See bench/gpu.py --help.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" bench/gpu.py "$@"
