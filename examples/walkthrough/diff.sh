#!/bin/sh
# What a step changes against the step it is made from:  examples/walkthrough/diff.sh 3
set -eu
cd "$(dirname "$0")"
step=$(printf '%02d' "${1:?Which step?  make walkthrough-diff N=3}")
case $step in 01) from=00 ;; 02) from=01 ;; 03) from=02 ;; 04) from=03 ;; 05) from=04 ;; 06) from=04 ;; 07) from=03 ;; 08) from=04 ;;
*) echo "There are steps 1 to 8." >&2; exit 2 ;; esac
diff -u $from-*.c "$step"-*.c || [ $? = 1 ]
