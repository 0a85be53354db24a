#!/bin/sh
# Make the environments of the libraries that benchmarks/training_speed.py measures and tests/parity
# compares with: each pins other versions of shared packages than we do. torch comes first, and stays: a range that admits a newer
# one would fetch gigabytes of CUDA libraries. Usage: benchmarks/peers.sh
set -eu
cd "$(dirname "$0")/.."
tests/parity/environment.sh .venv-saelens
"${PYTHON:-python3}" -m venv .venv-sparsify
.venv-sparsify/bin/pip install --quiet torch==2.13.0
.venv-sparsify/bin/pip install --quiet torch==2.13.0 eai-sparsify==1.3.3
.venv-sparsify/bin/python -c "import importlib.metadata as m; print('eai-sparsify', m.version('eai-sparsify'))"
# For its classes alone: what it depends on does not install beside a current torch.
.venv-sparsify/bin/pip install --quiet --no-deps dictionary-learning==0.1.0
# For benchmarks/query_speed.py.
"${PYTHON:-python3}" -m venv .venv-duckdb
.venv-duckdb/bin/pip install --quiet duckdb==2.0.0
.venv-duckdb/bin/python -c "import duckdb; print('duckdb', duckdb.__version__)"
