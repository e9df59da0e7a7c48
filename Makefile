.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

help:  ## list the targets
	@grep -E '^[a-z_]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z_]+):.*## /\1\t/' | expand -t 16

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps torchscale==0.3.0  # it pins a dead fairscale
	# The emoji's third style; what it asks for, a typesetter under the AGPL, is not needed to read a font.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps rinoh-typeface-symbola==0.1.1
	# Beside the environment, for two tests: where transformers sees torchvision it takes other image processors.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/beside \
		timm==1.0.31 torchvision==0.28.0 open_clip_torch==3.3.0 ftfy==6.3.1 wcwidth==0.9.4
	touch $@

install: $(INSTALLED)  ## make .venv and install the project into it

quickstart: $(INSTALLED)  ## distil a student on the icons and evaluate it
	$(BIN)/accelerate launch -q train.py --config recipes/icons.yaml

demo:  ## search icons in this machine's browser with the quickstart's student (needs Python and npm alone)
	$(PYTHON) -m inference.web_page demo build/demo
	$(PYTHON) -m inference.web_open build/demo

test: $(INSTALLED)  ## run the tests
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

browser_test: $(INSTALLED)  ## run the Space and the page in a headless Chromium (apt-get install chromium chromium-driver)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo]" "selenium>=4.51"
	$(BIN)/python -m inference.web_runtime
	$(BIN)/python -m pytest -m browser

bench: $(INSTALLED)  ## measure what docs/results/benchmarks.md claims, on CPU, in under 20 minutes
	$(BIN)/python -m benchmarks

soak: $(INSTALLED)  ## run the long tests: 300,000 rows, 30 kills, 10,000 hostile inputs, oldest and newest libraries
	$(BIN)/python -m pytest -m soak -rP -o faulthandler_timeout=3600 tests/test_soak.py  # alone: it compares rows per second
	$(BIN)/python -m pytest -m soak -rP -o faulthandler_timeout=3600 -n logical --maxprocesses 4 --ignore tests/test_soak.py
	$(BIN)/python tests/lower_bounds.py .venv/bounds
	$(BIN)/python tests/clean_environments.py .venv/clean

quality: $(INSTALLED)  ## check style, lint and known vulnerabilities (make style mends what it can)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	test -d .venv/audit || $(BIN)/pip install --quiet --disable-pip-version-check --target .venv/audit "pip-audit>=2.10"
	PYTHONPATH=.venv/audit $(BIN)/python tests/audit.py

style: $(INSTALLED)  ## format and mend lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## make the pages of docs/ a site, links checked: build/docs/index.html
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/python -m docs.write_settings
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

icons_teacher: $(INSTALLED)  ## train the icons teacher again and write its features (over half an hour)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[teacher]"
	$(BIN)/python -m teachers.icons_towers --image_size 64 --output_dir runs/icons_towers
	$(BIN)/accelerate launch -q train.py --config recipes/icons_teacher.yaml
	$(BIN)/python -m datasets_scripts.icons_teacher --model_name_or_path runs/icons_teacher --output runs/icons_teacher.safetensors

emoji: $(INSTALLED)  ## make the emoji with a teacher's features, the study's second set: runs/emoji_taught
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[teacher]"
	$(BIN)/python -m datasets_scripts.emoji --output_dir runs/emoji
	$(BIN)/python -m teachers.icons_towers --image_size 64 --output_dir runs/icons_towers
	$(BIN)/accelerate launch -q train.py --config recipes/icons_teacher.yaml --dataset_name runs/emoji \
		--num_train_epochs 12 --output_dir runs/emoji_teacher
	$(BIN)/python -m datasets_scripts.add_teacher_features --dataset_name runs/emoji \
		--teacher_model_name_or_path runs/emoji_teacher --output_dir runs/emoji_taught

clipart: $(INSTALLED)  ## make the clip art with a teacher's features, the third set: runs/clipart_taught (apt-get install openclipart-svg)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[teacher,clipart]"
	$(BIN)/python -m datasets_scripts.clipart --output_dir runs/clipart
	$(BIN)/python -m teachers.icons_towers --image_size 64 --output_dir runs/icons_towers
	$(BIN)/accelerate launch -q train.py --config recipes/icons_teacher.yaml --dataset_name runs/clipart \
		--output_dir runs/clipart_teacher
	$(BIN)/python -m datasets_scripts.add_teacher_features --dataset_name runs/clipart \
		--teacher_model_name_or_path runs/clipart_teacher --output_dir runs/clipart_taught

.PHONY: help install quickstart demo test browser_test bench soak quality style docs icons_teacher emoji clipart
