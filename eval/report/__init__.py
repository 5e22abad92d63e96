"""One HTML page about runs, which needs no server: `python -m eval.report RUN [RUN ...]`."""
