#!/bin/sh
# Runs inside the image during `cog build`, as cog.yaml says; "gpu" is for an image with PyTorch.
set -eu
cd "$(dirname "$0")/.."

# Some bases have a compiler, and packages that need it. Elsewhere it goes again.
compiler=
command -v g++ >/dev/null || compiler=g++
apt-get update -qq
[ -z "$compiler" ] || apt-get install -qqy --no-install-recommends "$compiler" >/dev/null

# The project comes to /src later, around this folder.
python -m convmixer.cpu.compiler /src/convmixer/cpu/ahead
if [ "${1:-}" = gpu ]; then
    python -m convmixer.gpu.ahead
    chmod a+x /root # uv keeps Python below it, and a container may run as an ordinary user
fi

# What Cog's own steps fetched with. Their layers keep their size.
apt-get purge -qqy --auto-remove $compiler curl git wget xz-utils >/dev/null
rm -rf /var/lib/apt/lists/*

# uv leaves this to the first start, and not every container may write it.
python -m compileall -q "$(python -c 'import cog, pathlib; print(pathlib.Path(cog.__file__).parents[1])')"

model=convmixer_768_32
if file=$(CONVMIXER_CACHE=weights python -m convmixer download "$model"); then
    mkdir -p "$CONVMIXER_CACHE"
    cp "$file" "$CONVMIXER_CACHE/"
else
    echo "$model could not be downloaded: the image has the shipped model alone."
fi
