#!/bin/sh
# The core's own tests under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.
# Usage: tests/native/run_sanitizers.sh [rounds]; PYTHON and CC choose interpreter and compiler.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} cc=${CC:-cc} rounds=${1:-3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

run() { # name, flags, options
    echo "== $1"
    "$python" -m turbomoe.native.build --output "$folder/$1/libcore.so" -- -Werror $2 -g -O1 -DUNROLL= -fno-omit-frame-pointer >/dev/null
    "$cc" -std=gnu11 -Wall -Wextra -Werror -Iturbomoe/native/src $2 -g -O1 -pthread tests/native/c/core_test.c \
        "$folder/$1/libcore.so" -Wl,-rpath,"$folder/$1" -lm -o "$folder/$1/core_test"
    env "$3" "$folder/$1/core_test" "$rounds"
}

run plain "" "TM=1"
run address "-fsanitize=address,undefined -fno-sanitize-recover=all" "ASAN_OPTIONS=detect_leaks=1"
run thread "-fsanitize=thread" "TSAN_OPTIONS=halt_on_error=1"
echo "all sanitizers are clean"
