# make demo   the whole path on real data: fetch, upcycle, train twice, evaluate, report   (about 8 minutes)
# make test   the test suite, slow matrices included
# make test-floor test-newest   a sample of it on the oldest versions (constraints-floor.txt) and the newest that setup.py allows
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= dev
BIN := $(VENV)/bin

SAMPLE := tests/test_objectives.py tests/hub/test_saving.py tests/readouts/test_committee.py \
	tests/predictions/test_predictions.py tests/training/test_trainer.py tests/probes/test_probes.py tests/metrics
SAMPLED := HF_HUB_OFFLINE=1 PYTHONPATH=. $(VENV)-layer/bin/python -m pytest -q -m "not slow" -k "not inkling and not granite" $(SAMPLE)

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
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

test-fast: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "not slow"

# A layer over the environment holds only what differs from it, so that neither takes minutes to install.
test-floor test-newest: setup
	$(PYTHON) -m venv --clear $(VENV)-layer
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(VENV)-layer/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_below.pth
	grep "^torch==" constraints.txt > $(VENV)-layer/torch.txt
	$(VENV)-layer/bin/python -m pip install -q $(if $(filter test-floor,$@),-r constraints-floor.txt,\
		-U --upgrade-strategy eager -c $(VENV)-layer/torch.txt -e .)
	$(SAMPLED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf runs build *.egg-info
