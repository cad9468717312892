PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
EXTRA := $(VENV)/.extra
# two tests at once, a thread each: more threads in each would wait for one another
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

.PHONY: help install demo tour test test-all soak mutants table paper bench clean

help:
	@echo "make install  make $(VENV) with the packages of requirements.txt: 5 GB, a minute or two"
	@echo "make demo   run the whole method once, small, on the CPU"
	@echo "make tour   install Jupyter into $(VENV) and open docs/tour.ipynb in the browser"
	@echo "make test   ruff, then the quick tests: 5 minutes on 2 quiet cores"
	@echo "make test-all  ruff, then all tests; installs requirements-extra.txt"
	@echo "make soak   kill each command at 100 points and see that it resumes; long"
	@echo "make mutants  break one line after another in a copy and see that a test fails; 10 minutes"
	@echo "make table  the result tables of glyphs and fontchars: benchmarks/RESULTS.md; a day on 2 cores; resumes"
	@echo "            DATA_ROOT=data/mine POOL=ckpt/pools/mine adds that of your images, tested on their meta_val"
	@echo "make paper SCENARIO=un_cifarfs DATA=path/to/cifar100  a row of the paper's table, from the data on; resumes"
	@echo "            GPUS=4 uses 4 GPUs; FLAGS='--print sbatch' prints the commands for Slurm and runs nothing"
	@echo "make bench  how fast sampling, testing and training are on the CPU, small: 5 minutes on 2 quiet cores"
	@echo "make clean  remove caches; runs, data and $(VENV) stay"
	@echo "PYTHON=...  the Python (3.11 or newer) that makes $(VENV); now $(PYTHON)"

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is older than 3.11; run make PYTHON=python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(EXTRA): requirements-extra.txt $(STAMP)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-extra.txt
	@touch $@

install: $(STAMP)
	@echo "installed in $(VENV); now: . $(VENV)/bin/activate"

demo: $(STAMP)
	$(VENV)/bin/python -m benchmarks.demo

tour: $(STAMP)
	$(VENV)/bin/python -c 'import jupyterlab' 2>/dev/null || \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check jupyterlab
	$(VENV)/bin/python -m jupyterlab docs/tour.ipynb

test: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check --quiet .
	$(PYTEST) -m "not slow"

test-all: $(STAMP) $(EXTRA)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check --quiet .
	$(PYTEST)

soak: $(STAMP)
	KILLS=100 $(VENV)/bin/python -m pytest -q tests/test_survival.py

mutants: $(STAMP)
	$(VENV)/bin/python tests/mutants.py

table: $(STAMP)
ifdef DATA_ROOT
	$(VENV)/bin/python -m benchmarks.table --publish --small --dataset custom --data-root "$(DATA_ROOT)" \
		$(if $(POOL),--pool "$(POOL)") --test --split meta_val
endif
	$(VENV)/bin/python -m benchmarks.table --publish --dataset glyphs
	$(VENV)/bin/python -m benchmarks.table --publish --dataset fontchars

paper: $(STAMP)
	@$(VENV)/bin/python -m benchmarks.paper --scenario $(SCENARIO) $(if $(DATA),--data "$(DATA)") \
		$(if $(GPUS),--gpus $(GPUS)) $(FLAGS)

bench: $(STAMP)
	@for work in synthesis meta_test meta_train pretrain; do \
		$(VENV)/bin/python -m benchmarks.$$work --size small --device cpu || exit $$?; \
	done

clean:
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache
