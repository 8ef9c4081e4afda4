#!/bin/sh
# The core's own tests: CASES random shapes and routings against a naive reference, then a share of them under
# AddressSanitizer with UndefinedBehaviorSanitizer, and fewer under ThreadSanitizer, which is slowest.
# Usage: tests/native/run_sanitizers.sh [CASES]; PYTHON and CC choose interpreter and compiler.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} cc=${CC:-cc} cases=${1:-10000}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

run() { # name, flags, options, cases, rounds
    echo "== $1"
    "$python" -m turbomoe.native.build --output "$folder/$1/libcore.so" -- -Werror $2 -g -O1 -DUNROLL= \
        -fno-omit-frame-pointer >/dev/null
    "$cc" -std=gnu11 -Wall -Wextra -Werror -Iturbomoe/native/src $2 -g -O1 -pthread tests/native/c/core_test.c \
        "$folder/$1/libcore.so" -Wl,-rpath,"$folder/$1" -lm -o "$folder/$1/core_test"
    env "$3" "$folder/$1/core_test" "$4" "$5"
}

run plain "" "TM=1" "$cases" 3
run address "-fsanitize=address,undefined -fno-sanitize-recover=all" "ASAN_OPTIONS=detect_leaks=1" $((cases / 5)) 3
# By default TSan refuses threads in a forked child, which is what the fork test is about.
run thread "-fsanitize=thread" "TSAN_OPTIONS=halt_on_error=1:die_after_fork=0" $((cases / 20)) 2
echo "all sanitizers are clean"
