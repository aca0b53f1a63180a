#!/usr/bin/env bash
# Regenerate the Python that lies beside proto/**/*.proto, and delete what no .proto makes any more.
# With --check write nothing; fail when what is committed differs from what would be generated.
#   PYTHON  the interpreter that has grpcio-tools and mypy-protobuf (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
bin=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

"$python" -m grpc_tools.protoc --proto_path=proto \
    --python_out="$made" --grpc_python_out="$made" \
    --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" --mypy_out="$made" \
    --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" --mypy_grpc_out="$made" \
    $(find proto -name '*.proto' | sort) 2> >(grep -v '^Writing ' >&2)

if [ "${1:-}" = --check ]; then
    if ! diff -r -x '*.proto' -x 'buf.*' -x __pycache__ proto "$made"; then
        echo "the generated protobuf code is not fresh: run 'make proto' and commit the result" >&2
        exit 1
    fi
else
    find proto \( -name '*_pb2.py*' -o -name '*_pb2_grpc.py*' \) -delete
    cp -R "$made"/. proto/
fi
