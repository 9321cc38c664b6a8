# Everything a fresh clone needs. What is built lies in .venv, book/run and _build, and nowhere else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= pocket
# Pages that run side by side. Each loads its own models: one at a time where they are large.
JOBS ?= $(if $(filter pocket,$(PROFILE)),2,1)
BIN := .venv/bin
READY := .venv/.installed

.PHONY: book test lab bench clean distclean

book: $(READY)  ## run every notebook that has not run as it stands, build the site
	$(BIN)/chassis run --profile $(PROFILE) --missing --jobs $(JOBS)
	$(BIN)/chassis book --profile $(PROFILE)

test: $(READY)  ## the tests, two files at a time, one thread each; pages and JupyterLab in a browser where there is one
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: $(READY)  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. notebooks

bench: $(READY)  ## ratios, each measured within one run
	@$(BIN)/python benchmarks/bench.py
	@$(BIN)/python benchmarks/families.py --out benchmarks/families.json

clean:  ## what was built, but not the environment
	rm -rf _build build book/run *.egg-info .pytest_cache .ruff_cache .hypothesis .jupyter_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean  ## the environment too
	rm -rf .venv

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "CHASSIS needs Python 3.11; '$(PYTHON)' is not it. Install it, or say: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book,lab,peft,test]"
	@touch $@
