#!/bin/sh
# Runs inside the image during `cog build`, as cog.yaml says; "gpu" is for an image with PyTorch.
set -eu
cd "$(dirname "$0")/.."

# Some bases have a compiler, and packages that need it. Elsewhere it goes again.
compiler=
command -v g++ >/dev/null || compiler=g++
apt-get update -qq
[ -z "$compiler" ] || apt-get install -qqy --no-install-recommends "$compiler" >/dev/null

python -m convmixer.cpu.compiler "$CONVMIXER_CACHE/kernels"
if [ "${1:-}" = gpu ]; then
    python -m convmixer.gpu.ahead
    chmod a+x /root # uv keeps Python below it, and a container may run as an ordinary user
fi

# What Cog's own steps fetched with. Their layers keep their size.
apt-get purge -qqy --auto-remove $compiler curl git wget xz-utils >/dev/null
rm -rf /var/lib/apt/lists/*

# uv leaves this to the first start, and not every container may write it.
python -m compileall -q "$(python -c 'import cog, pathlib; print(pathlib.Path(cog.__file__).parents[1])')"

# The default model's weights, so that no container has to fetch them. They come from either of two places.
model=convmixer_768_32
weights=$PWD/weights
if file=$(CONVMIXER_CACHE=$weights HF_HOME=$weights python -m convmixer download "$model"); then
    mkdir -p "$CONVMIXER_CACHE"
    case $file in
    *.pth.tar) cp "$file" "$CONVMIXER_CACHE/$model.pth.tar" ;;
    *) cp "$file" "$CONVMIXER_CACHE/$model.safetensors" ;;
    esac
else
    echo "$model could not be downloaded: the image has the shipped model alone."
fi
