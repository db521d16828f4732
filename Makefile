# make demo   the whole path on real data: fetch, upcycle, train by three methods, evaluate, report   (about 10 minutes)
# make test   the test suite, slow matrices included
# make test-floor test-newest   a sample of it on the oldest versions (constraints-floor.txt) and the newest that setup.py allows
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= dev
BIN := $(VENV)/bin
# One process for each core, and each test file in one process, since tests of a file share what they build.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# What the versions differ in: gradients, resuming, caches, saving and loading, the table, the evaluate module.
SAMPLE := tests/training/test_trainer.py tests/readouts/test_committee.py tests/hub/test_saving.py \
	tests/predictions/test_predictions.py tests/metrics/test_metrics_evaluate.py \
	tests/probes/test_probes.py::test_decoding_with_a_cache

.PHONY: setup demo test test-fast test-floor test-newest lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: setup
	$(BIN)/python scripts/fetch_data.py
	$(BIN)/python scripts/demo.py

test: setup
	$(BIN)/python scripts/fetch_data.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTEST) --durations=30

test-fast: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTEST) -m "not slow"

# A layer over the environment holds only what differs from it, so that neither takes minutes to install.
test-floor test-newest: setup
	$(PYTHON) -m venv --clear $(VENV)-layer
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(VENV)-layer/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_below.pth
	grep "^torch==" constraints.txt > $(VENV)-layer/torch.txt
	$(VENV)-layer/bin/python -m pip install -q --no-compile $(if $(filter test-floor,$@),-r constraints-floor.txt, \
		-U --upgrade-strategy eager -c $(VENV)-layer/torch.txt -e .)
	HF_HUB_OFFLINE=1 PYTHONPATH=. $(VENV)-layer/bin/python -m pytest -q -m "not slow" $(SAMPLE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs build *.egg-info
