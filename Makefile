# make demo and make test work as the first command on a fresh machine: they create .venv, install and build.
PYTHON ?= python3
# The PyTorch to install. The index of pip decides between its CPU and CUDA builds; TRITON must be the release that this
# PyTorch was built for (a CUDA build brings it; on a CPU build it serves the tests of the GPU kernels).
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.8.0

VENV    := .venv
BIN     := $(VENV)/bin
CONFIG  := $(VENV)/.config
LIBRARY := convrnn/_C.abi3.so
SOURCES := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: setup demo test test-gpu test-sanitized bench bench-compare kernel-report lint wheel test-wheel clean

setup: $(LIBRARY)

# What the environment was made for: made anew where TORCH or TRITON say otherwise, built anew where DEBUG or SANITIZE do.
MADE_FOR := $(TORCH) $(TRITON) DEBUG=$(DEBUG) SANITIZE=$(SANITIZE)
ifneq ($(MAKECMDGOALS),clean)
$(shell mkdir -p $(VENV); echo "$(MADE_FOR)" | cmp -s - $(CONFIG) || echo "$(MADE_FOR)" > $(CONFIG))
endif

$(VENV)/.installed: $(CONFIG) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TRITON)" "setuptools>=77" wheel ninja
	touch $@

$(LIBRARY): $(VENV)/.installed setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[bench,examples,lint,test]"
	touch $@

demo: $(LIBRARY)
	$(BIN)/python -m examples.video_classification demo

# The suite twice: with the C++ kernels, and with the machine code of the Triton kernels executed (tests/harness/ptx); then what
# Triton's interpreter alone shows, the arithmetic that their source asks for. A process a core, one thread each: more would
# wait for one another. Files are begun in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
test: $(LIBRARY)
	$(PYTEST) $(ARGS)
	CONVRNN_BACKEND=ptx $(PYTEST) $(ARGS)
	CONVRNN_BACKEND=triton $(PYTEST) -m interpreted $(ARGS)

test-gpu: $(LIBRARY)
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu: no CUDA device is present (python -m convrnn.info says why)')"
	$(BIN)/python -m pytest --device cuda $(ARGS)

# The C++ kernels under the address and undefined-behaviour sanitizers, in the tests of ops and modules. The sanitizers'
# libraries must come before Python's own; leaks are not counted, for Python's are not ours. The next plain make builds
# without them again.
SANITIZED := $(foreach name,mingru mingru_masks log_scan scan_chunks gru_gates gru_rcn gru_rcn_masks gru_rcn_projection gru_rcn_outliers gru_rcn_library nn_mingru nn_conv_mingru nn_masks nn_gru_rcn nn_conv_gru nn_stacked_gru_rcn nn_bidirectional,tests/test_$(name).py)
test-sanitized:
	$(MAKE) setup SANITIZE=address,undefined
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(PYTEST) $(SANITIZED) $(ARGS)

bench: $(LIBRARY)
	$(BIN)/python -m bench $(ARGS)

# Times this checkout's kernels against those of BASE, a git ref or a JSON file of make bench; fails where one got slower.
bench-compare: $(LIBRARY)
	@test -n "$(BASE)" || { echo "make bench-compare needs BASE=<git ref, or JSON file of make bench>" >&2; exit 2; }
	$(BIN)/python -m bench.compare "$(BASE)" $(ARGS)

# What the Triton kernels compile to for GPUs that need not be present, and the bytes they move: bench/results/kernels.json.
kernel-report: $(LIBRARY)
	$(BIN)/python -m bench.kernel_report $(ARGS)

lint: $(LIBRARY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(LIBRARY)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

# The one wheel, as it is, beside each of these PyTorches in an environment of its own, newest being what pip takes where it
# may choose; the tests run from a copy, so that nothing of the checkout is imported. Downloads a PyTorch each: for releases,
# CI does not call it.
WHEEL_TORCH ?= 2.10.0 2.13.0 2.14.1 newest
WHEEL_TESTS := $(foreach name,registration opcheck mingru log_scan gru_rcn nn_gru_rcn nn_mingru nn_conv_mingru torchscript,tests/test_$(name).py)
test-wheel: wheel
	@set -e; for torch in $(WHEEL_TORCH); do \
	  folder=build/wheel-$$torch; rm -rf $$folder/tests; mkdir -p $$folder; \
	  cp -r tests pyproject.toml $$folder; \
	  test -x $$folder/venv/bin/python || $(PYTHON) -m venv $$folder/venv; \
	  if test $$torch = newest; then wanted="--upgrade torch"; else wanted="torch==$$torch"; fi; \
	  $$folder/venv/bin/python -m pip install --quiet $$wanted numpy pytest pytest-xdist; \
	  $$folder/venv/bin/python -m pip install --quiet --force-reinstall --no-deps dist/convrnn-*-cp310-abi3-*.whl; \
	  (cd $$folder && venv/bin/python -c "import torch; print('torch', torch.__version__)" && OMP_NUM_THREADS=1 venv/bin/python -m pytest -q -n auto --dist loadfile $(WHEEL_TESTS) $(ARGS)); \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info convrnn/*.so
