#!/bin/sh
# Make the environment in which tests/parity runs SAELens, apart from our own: the two libraries
# pin other versions of shared packages. Usage: tests/parity/environment.sh [FOLDER]
set -eu
folder="${1:-.venv-saelens}"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/pip" install --quiet sae-lens==6.54.0
"$folder/bin/python" -c "import sae_lens; print('sae-lens', sae_lens.__version__)"
