#!/usr/bin/env bash
# One command for a machine with a GPU: build, tests, sanitizers, roofline table, peers, a whole 8B layout.
# Needs no network. Usage: bench/device.sh [step ...]; without names every step runs. Python is $PYTHON or
# python3; wheels that the machine lacks (pydantic, mergekit and what they import) lie in ./wheels, which git
# ignores. Results: device.json and device.log in $OUT, or in build/device. Where .git does not travel along,
# PYKERNELS_COMMIT names the commit.
#
# Every step has its own time and the whole has 590 s, as bench/device_steps.py holds them; on one H200:
#   wheels 15 + device 20 + build 150 + tests 180 + large 40 + memcheck 45 + racecheck 45 + table 70 +
#   peers 80 + llama 60 + targets 10: at most; the build is expected to take 60 to 100 s, the tests 120 s, the
#   others two thirds of what they may. What does not fit is on record as left out, the last step first.
#
# Exit status: 0 when all steps passed or were refused by a tool, 1 when one failed, 3 without a device.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/device_steps.py "$@"
