#!/usr/bin/env bash
# One command for a machine with a GPU: build, tests, sanitizers, roofline table, softmax, LoRA, peers, a whole
# 8B layout. Needs no network. Usage: bench/device.sh [step ...]; without names every step runs. Python is
# $PYTHON or python3, with torch, triton, pybind11, cmake, ninja and pytest. Wheels that it lacks lie in ./wheels,
# which git ignores: for the recipes pydantic, pydantic-core, annotated-types and typing-inspection, for
# comparisons mergekit, and peft with accelerate, psutil and transformers
# ("pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels ..." fetches them).
# Results: device.json and device.log in $OUT, or in build/device. Where .git does not travel along,
# PYKERNELS_COMMIT names the commit.
#
# Every step ends after its own time, and the whole after 580 s (bench/device_steps.py):
#   wheels 5 + device 40 + build 95 + tests 120 + memcheck 40 + racecheck 30 + table 30 + softmax 55 +
#   lora 80 + traffic 25 + peers 20 + llama 30 + targets 5, then large 25 and memcheck-triton 25
# The first two need seconds once files are in memory; the build compiles for the one device, in 40 to 70 s by
# what its slowest files take. The last two have what the others leave over.
#
# Exit status: 0 when all steps passed or were refused by a tool, 1 when one failed, 3 without a device.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/device_steps.py "$@"
