# `make demo` and `make test` set up .venv by themselves; nothing else has to be installed by hand.
# The release that jax[rocm7-local] resolves to; `make test-all` runs the tests under two others.
JAX ?= 0.12.0
PLUGIN ?= jax-rocm7-pjrt
JOBS ?= 2
VENV ?= .venv
BIN = $(VENV)/bin
# Tests that share compiled programs run in one worker, see tests/support/distribution.py.
PYTEST = -m pytest -q -n $(JOBS) --dist loadgroup --no-loadscope-reorder
# Other versions of jax that are supported; the newest one with the plugin of ROCm 10.
OLDER = 0.11.2
NEWER = 0.12.0.1
# With 64-bit types, the docs' snippets and the training script make float64 arrays, which operators refuse, and a step has
# one launch more than the tests of inspection allow.
FOR_32_BITS = $(addprefix --ignore tests/,test_docs.py models/test_train_tiny.py tools/test_inspection.py)
# Slices of the long tests: each is to take less than 5 minutes on 2 cores, and all are to be run within 48 commits.
SLICES = 48
# The offline compilers for AMD GPUs: those of the extra `cdna`, of this release of jax.
RELEASE = $(shell echo $(JAX) | cut -d. -f1-3)
CDNA = 'triton==3.6.0' 'cramjam>=2.9' '$(PLUGIN)==$(RELEASE)'

.PHONY: help demo test test-all test-slice mutants docs lint bench counts notebook clean

help:
	@echo "make demo      serve the small trained model on real text"
	@echo "make test      set up and run the tests (CPU only)"
	@echo "make test-all  the long sweeps too, and the tests again under jax $(OLDER) and $(NEWER): what has not passed yet, in shards;"
	@echo "               make test-all SHARD=3/8 runs one"
	@echo "make mutants   break the library in 60 seeded ways and report which of them the tests notice"
	@echo "make docs      build the documentation into out/site"
	@echo "make lint      ruff, formatting, types"
	@echo "make notebook  execute the examples and write their notebooks"
	@echo "make counts    renew benchmarks/cdna_counts.json: wave-instructions of the kernels on gfx942 and gfx950"
	@echo "make bench     decode throughput of the demo model on this machine"

$(VENV)/.ready: pyproject.toml
	@for p in $(PYTHON) python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python3 python3.13 python3.14 python3; do \
	  if "$$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found="$$p"; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "sparse_mla_jax needs Python 3.12 or newer: install it (pyenv install 3.12) or run make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$found and jax $(JAX) (a few minutes the first time)"; \
	"$$found" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,plot,docs]' 'jax==$(JAX)' 'jaxlib==$(JAX)' $(CDNA)
	@touch $@

# LLVM's tools read the machine code of gfx942 and gfx950; tests that need them skip with a line where they are missing.
.PHONY: llvm
llvm:
	@command -v llvm-objdump-22 >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing llvm-22 (Debian package)"; \
	  { apt-get install -y -qq --no-install-recommends llvm-22 || { apt-get update -qq && apt-get install -y -qq --no-install-recommends llvm-22; }; } >/dev/null 2>&1 \
	    || echo "llvm-22 could not be installed: tests of CDNA machine code will be skipped"; \
	else echo "no llvm-objdump-22 here: install llvm-22 (Debian: apt-get install llvm-22), or tests of CDNA machine code are skipped"; fi

demo: $(VENV)/.ready
	@$(BIN)/python -m sparse_mla_jax demo

test: $(VENV)/.ready llvm
	$(BIN)/python $(PYTEST) -m "not slow"

test-all: $(VENV)/.ready llvm
	$(MAKE) VENV=.venv-jax-$(OLDER) JAX=$(OLDER) .venv-jax-$(OLDER)/.ready
	$(MAKE) VENV=.venv-jax-$(NEWER) JAX=$(NEWER) PLUGIN=jax-rocm10-pjrt .venv-jax-$(NEWER)/.ready
	@$(BIN)/python tests/run_shards.py all $(if $(SHARD),--shard $(SHARD)) \
	  --suite "jax $(JAX)=$(BIN)/python $(PYTEST) --optimize" \
	  --suite "jax $(JAX) with 64-bit types, without long tests=env JAX_ENABLE_X64=1 $(BIN)/python $(PYTEST) -m 'not slow' $(FOR_32_BITS)" \
	  --suite "jax $(OLDER) without long tests=.venv-jax-$(OLDER)/bin/python $(PYTEST) -m 'not slow'" \
	  --suite "jax $(NEWER) without long tests=.venv-jax-$(NEWER)/bin/python $(PYTEST) -m 'not slow'"

# One slice of the long tests, another one after each commit; 30 of its 300 s are left for the test that runs then.
test-slice: $(VENV)/.ready llvm
	@$(BIN)/python tests/run_shards.py slice --of $(SLICES) --deadline 270 -- $(BIN)/python $(PYTEST)

# Which faults do the tests notice? COUNT and SEED choose them; what is known of this tree is kept in .mutants.
COUNT ?= 60
SEED ?= 0
mutants: $(VENV)/.ready llvm
	PYTHONPATH=tests $(BIN)/python -u -m mutation.run --count $(COUNT) --seed $(SEED) --jobs $(JOBS)

# mkdocs says on every run what will follow it.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "out/site/index.html"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

counts: $(VENV)/.ready llvm
	$(BIN)/python benchmarks/cdna_counts.py --renew

bench: $(VENV)/.ready
	@$(BIN)/python -m sparse_mla_jax bench examples/tiny_python

notebook: $(VENV)/.ready llvm
	for name in decode_step cdna_kernels deepseek_v4; do \
	  $(BIN)/python -c "import sys, jupytext, nbformat, nbclient; path = 'examples/' + sys.argv[1]; n = jupytext.read(path + '.py'); \
	  nbclient.NotebookClient(n, record_timing=False, resources={'metadata': {'path': 'examples'}}).execute(); \
	  [c.update(outputs=[o for o in c.outputs if o.get('name') != 'stderr']) for c in n.cells if c.cell_type == 'code']; \
	  nbformat.write(n, path + '.ipynb')" $$name || exit 1; \
	done

clean:
	rm -rf .venv .venv-jax-* .test-all .pytest_cache .ruff_cache .mypy_cache .hypothesis out
