#!/bin/sh
# Builds the libraries for cross-compiled tests from Debian's sources:
#   tests/cross_libraries.sh DIRECTORY    makes DIRECTORY/aarch64 and DIRECTORY/windows, each with include and lib
# Package lists are kept in DIRECTORY, so this machine's apt does not change.
set -eu
mkdir -p "$1/apt/lists/partial" "$1/apt/cache/archives/partial" "$1/apt/sources"
cd "$1"

apt() {
    apt-get -qq -o Dir::Etc::SourceList="$PWD/apt/sources.list" -o Dir::Etc::SourceParts="$PWD/apt/sources" \
        -o Dir::State::Lists="$PWD/apt/lists" -o Dir::Cache="$PWD/apt/cache" -o APT::Sandbox::User=root "$@"
}

fetch() {
    for list in /etc/apt/sources.list.d/*.sources; do
        [ ! -e "$list" ] || sed 's/^Types:.*/Types: deb-src/' "$list" >"apt/sources/$(basename "$list")"
    done
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null | sed -n 's/^deb /deb-src /p' >apt/sources.list
    apt update
    apt source --download-only "$@"
    for package; do
        mkdir -p "$package"
        tar xf "$package"_*.orig.tar.?z -C "$package" --strip-components 1
    done
}

build() { # DIRECTORY COMPILER SYSTEM
    for package in cmocka jansson; do
        cmake -S $package -B "$1/$package" -DCMAKE_C_COMPILER="$2" -DCMAKE_SYSTEM_NAME="$3" -DCMAKE_BUILD_TYPE=Release \
            -DCMAKE_INSTALL_PREFIX="$PWD/$1" -DCMAKE_INSTALL_LIBDIR=lib -DBUILD_SHARED_LIBS=OFF -DWITH_STATIC_LIB=ON \
            -DWITH_EXAMPLES=OFF -DJANSSON_BUILD_DOCS=OFF -DJANSSON_WITHOUT_TESTS=ON -DJANSSON_EXAMPLES=OFF
        cmake --build "$1/$package" --target install
    done
    cp "$1/lib/libcmocka-static.a" "$1/lib/libcmocka.a"
}

echo "  compile cmocka and jansson for aarch64 and Windows"
exec 3>&2 >log 2>&1
trap '[ $? -eq 0 ] || tail -n 20 log >&3' EXIT
fetch cmocka jansson
build windows x86_64-w64-mingw32-gcc Windows &
build aarch64 aarch64-linux-gnu-gcc Linux
wait $!
